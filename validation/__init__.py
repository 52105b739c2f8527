"""The parity gate: scenarios, the eager reference, comparison in σ, and the search for the first fault."""
