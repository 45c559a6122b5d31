"""CorDA: A and B start as a part of W that the covariance of the inputs chooses."""
