"""What made-up runs contain."""

RELIABILITY = {"confidence": [0.25, 0.75], "accuracy": [0.5, 0.75], "count": [10, 30]}

HOSTILE = ("</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", '"><svg onload=alert(1)>', "%{x}<b>")


PICTURE = {
    "file": "trees.svg",
    "title": "2 trees",
    "summary": "a: C(O)",
    "head": ["class", "tree"],
    "rows": [["a", "C"]],
}
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="96" height="40"><script>alert(1)</script></svg>'


def history(accuracy):
    rows = [f"{step},0,{2 - step / 100},{accuracy - 10 / step},{step / 1000}" for step in range(25, 101, 25)]
    return "step,epoch,train/loss,val/acc,val/ece\n" + "\n".join(rows) + "\n"


CONFIG = """seed_everything: {seed}
run:
  root: runs
  experiment: {experiment}
  name: {name}
trainer:
  max_steps: 100
  default_root_dir: runs/{experiment}/{name}
  logger:
  - class_path: lit_distill.experiment.logger.RunLogger
    init_args:
      save_dir: runs
      version: {name}
model:
  class_path: {method}
  init_args:
    teacher: runs/{experiment}/teacher-s{seed}
    lr: {lr}
data:
  class_path: {data}
  init_args:
    root: {root}
    batch_size: {batch_size}
    train_size: {train_size}
    seed: {seed}
"""
