"""Does routing pay? Accuracy of task-routed adapters beside LoRAs of the same size, on real tasks."""
