"""What a new adapter starts as: one file for each way. The hook for others is `peft_lora_initializers`."""
