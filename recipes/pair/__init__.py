"""How the built-in pair (`outrider.pair`) was made: tokenizer, data, training, export, evaluation."""
