"""Adapters of mixture-of-experts models, between layouts with one module for each expert and with all experts in one parameter."""
