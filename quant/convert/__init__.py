"""Model directories made from others without quantising: adapters merged, GGUF written."""
