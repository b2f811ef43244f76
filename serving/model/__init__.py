"""The decoder, its weights, its tokenizer and its chat format; also what training trains."""
