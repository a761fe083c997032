"""The durable dynamic-sampling buffer: pure core, ledger, segments, service, client."""
