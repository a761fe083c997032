"""The vLLM engine behind few verbs, and the actor's loop."""
