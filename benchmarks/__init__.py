"""One script per table in docs/benchmarks.md. Everything here measures; nothing here is imported by the product."""
