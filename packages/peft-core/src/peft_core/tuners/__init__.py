"""What a tuner does to a model and to a call: the protocol, targeting, performing plans, assembling calls, built-in parts."""
