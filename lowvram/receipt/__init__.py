"""What a training costs: rates, energy as measured, and the ledger that a run folder carries between machines."""
