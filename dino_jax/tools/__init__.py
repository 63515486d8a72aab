"""Around a run: `plan` (compile for other hardware), `doctor` (check a machine), `bench`, the quick start."""
