"""One file = one benchmark; `htc_vlm.eval.task.find_tasks` imports them all."""
