"""What measures a model: perplexity, scoring and the harness, one model beside another, torch beside all."""
