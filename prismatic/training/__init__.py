"""What finetune.py is put together from: the step, the state that is kept, memory, processes, and what people look at."""
