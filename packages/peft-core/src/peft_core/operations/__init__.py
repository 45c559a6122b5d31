"""What is done to a model: functions over its index, each with its undo."""
