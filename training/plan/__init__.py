"""What a model costs to train and to serve: memory, time and money, worked out before anything is rented. No torch."""
