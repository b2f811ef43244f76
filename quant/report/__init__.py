"""What quantisation cost: measured on held-out text, told as JSON, Markdown and a picture."""
