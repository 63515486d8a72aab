"""What a run learns: a weighted sum of terms, one module each (see `objective.Objective`)."""
