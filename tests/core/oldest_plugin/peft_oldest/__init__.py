"""Three small methods and a listener, written for peft-core 0.1."""

__version__ = "0.1.0"
