"""The command line of peft-core. Imports neither torch nor a tuner."""
