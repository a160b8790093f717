"""What made-up runs contain."""

RELIABILITY = {"confidence": [0.25, 0.75], "accuracy": [0.5, 0.75], "count": [10, 30]}

HOSTILE = ("</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", '"><svg onload=alert(1)>', "%{x}<b>")


def history(accuracy):
    rows = [f"{step},0,{2 - step / 100},{accuracy - 10 / step},{step / 1000}" for step in range(25, 101, 25)]
    return "step,epoch,train/loss,val/acc,val/ece\n" + "\n".join(rows) + "\n"
