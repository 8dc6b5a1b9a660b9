"""How the model is made: tokenizer, architecture, the training stream, the two training stages."""
