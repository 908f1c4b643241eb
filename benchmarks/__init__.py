"""Speed, memory and size of task-routed adapters against LoRA, PEFT's own Poly and the bare model."""
