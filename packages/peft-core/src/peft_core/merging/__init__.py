"""What becomes of a base weight: changes that can be taken out again bit for bit."""
