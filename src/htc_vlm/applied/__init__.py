"""Any method on any vision-language model, for the length of a `with` block."""
