"""The search for the smallest file that keeps a perplexity budget."""
