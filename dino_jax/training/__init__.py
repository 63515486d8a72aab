"""A training run: `loop.train` repeats `step.train_step`; optimizer, schedules, teacher, metrics, collapse watch."""
