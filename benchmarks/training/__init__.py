"""Records of training for docs/training.md: runs that are compared, the curve of one run, and what it costs.

python -m benchmarks.training runs ViSpec=draft/ "no global feature"=ablation/ "prompt lookup"=lookup/
python -m benchmarks.training curve draft/ --picture docs/training_curve.svg
python -m benchmarks.training costs --model demo --source REQUESTS/held_out.jsonl --image-root REQUESTS/pictures

`python -m benchmarks.tables` then writes them into the page. A second record replaces the first.
"""
