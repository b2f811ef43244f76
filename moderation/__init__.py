"""The text classifier that judges what goes in and out, its policy and its training."""
