"""Adapters to other runtimes; each is imported only where that runtime is."""
