"""What examples make of a run, language modeling or classification, and how its answers are judged."""
