"""Many pictures, many questions: sources -> steps (decode; compress and ask) -> journal, on one machine or on Ray."""
