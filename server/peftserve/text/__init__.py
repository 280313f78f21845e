"""Text at the edge: tokenizer, chat template, incremental detokenizer, stop strings. Imports no torch."""
