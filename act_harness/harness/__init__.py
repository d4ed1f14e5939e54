"""Where lm-eval is spoken to: tasks found, both arms run, an installation examined."""
