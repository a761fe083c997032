"""From learner to actors: names, manifest, publish, fetch."""
