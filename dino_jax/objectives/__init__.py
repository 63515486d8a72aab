"""The training objective: a weighted sum of terms, one module each (see `objective.Objective`)."""
