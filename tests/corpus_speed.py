"""Measure the tokenization of a large corpus, and check that a run killed halfway ends with the same files: make corpus.

python tests/corpus_speed.py [MEGABYTES [ROUNDS [THREADS]]]

The corpus is synthetic: a JSONL file of documents made of sentences from the docstrings of Python's standard library. Each
round tokenizes it with the whole command of data/fineweb_edu, and then, as the baseline, with `encode_ordinary_batch` of
tiktoken on texts in memory. At the end, a run is killed halfway and resumed. Not part of the tests: 1,000 MB take minutes
per round.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import tiktoken

ROOT = Path(__file__).resolve().parents[1]
NAME = "corpus_speed"
FOLDER = ROOT / "data" / NAME
MEASURE = """# a process of its own: the peak memory of a command includes that of the process that starts it
import json, resource, subprocess, sys
if code := subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode:
    sys.exit(code)
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([usage.ru_utime + usage.ru_stime, usage.ru_maxrss]))
"""
BASELINE_BATCH_CHARACTERS = 16 << 20  # the whole corpus at once would take about 10 GB


def make_up(path: Path, size: int) -> None:
    """Write a JSONL file of about `size` bytes; always the same with the same version of Python."""
    rng, sentences = random.Random(1), []
    library = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(library.rglob("*.py")):
        if "packages" not in str(file.relative_to(library)):
            for docstring in re.findall(r'"""(.+?)"""', file.read_text(encoding="utf-8", errors="ignore"), re.DOTALL):
                sentences += [" ".join(sentence.split()) for sentence in re.split(r"(?<=[.!?])\s", docstring)]
    sentences = [sentence for sentence in sentences if 4 < len(sentence.split()) < 80]
    with open(path, "w", encoding="utf-8") as lines:
        while lines.tell() < size:
            text = " ".join(rng.choices(sentences, k=1 + int(rng.lognormvariate(3, 1))))  # about 3,000 characters
            lines.write(json.dumps({"text": text}) + "\n")


def command(path: Path, threads: int) -> list[str]:
    script = ROOT / "data" / "fineweb_edu" / "prepare.py"
    return [sys.executable, str(script), f"--input={path}", f"--name={NAME}", f"--workers={threads}"]


def ours(path: Path, threads: int) -> tuple[float, float, int]:
    """Run the command; return its seconds, CPU seconds and peak memory in bytes."""
    start = time.perf_counter()
    finished = subprocess.run([sys.executable, "-c", MEASURE, *command(path, threads)], stdout=subprocess.PIPE)
    seconds = time.perf_counter() - start
    if finished.returncode:  # the command has printed why
        sys.exit(finished.returncode)
    work, peak = json.loads(finished.stdout)
    return seconds, work, peak * (1 if sys.platform == "darwin" else 1024)


def batches(path: Path) -> Iterator[list[str]]:
    texts, size = [], 0
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            texts.append(json.loads(line)["text"])
            size += len(texts[-1])
            if size > BASELINE_BATCH_CHARACTERS:
                yield texts
                texts, size = [], 0
    yield texts


def baseline(path: Path, threads: int) -> tuple[float, float]:
    """Return the seconds and CPU seconds that tiktoken alone needs to encode the texts, without reading them."""
    encoding, seconds, work = tiktoken.get_encoding("gpt2"), 0.0, 0.0
    for texts in batches(path):
        start, work_start = time.perf_counter(), time.process_time()
        encoding.encode_ordinary_batch(texts, num_threads=threads)
        seconds, work = seconds + time.perf_counter() - start, work + time.process_time() - work_start
    return seconds, work


def digests() -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(FOLDER.iterdir())}


def kill_and_resume(path: Path, threads: int, tokens: int) -> int:
    """Kill a run once half of the tokens are saved, then resume it; return how many were saved."""
    process, saved = subprocess.Popen(command(path, threads), stdout=subprocess.DEVNULL, start_new_session=True), 0
    while saved < tokens // 2 and process.poll() is None:
        time.sleep(0.05)
        if (FOLDER / "progress.part").exists():
            saved = json.loads((FOLDER / "progress.part").read_bytes())["tokens"]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL and not (FOLDER / "train.bin").exists()
    ours(path, threads)
    return saved


def main(megabytes: int, rounds: int, threads: int) -> None:
    scratch = Path(tempfile.mkdtemp())
    try:
        path, ratios, speeds, peaks = scratch / "made_up.jsonl", [], [], []
        make_up(path, megabytes * 10**6)
        for number in range(1, rounds + 1):
            shutil.rmtree(FOLDER, ignore_errors=True)
            seconds, work, peak = ours(path, threads)
            found = digests()
            tokens = sum(json.loads((FOLDER / "meta.json").read_bytes())["tokens"].values())
            baseline_seconds, baseline_work = baseline(path, threads)
            print(
                f"round {number}: {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s, {work:.1f} CPU s, "
                f"{peak >> 20} MiB; tiktoken alone {baseline_seconds:.1f} s, {tokens / baseline_seconds:,.0f} tokens/s, "
                f"{baseline_work:.1f} CPU s; load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
            ratios.append(baseline_seconds / seconds)
            speeds.append(tokens / seconds)
            peaks.append(peak)
        print(f"median: {statistics.median(speeds):,.0f} tokens/s, {statistics.median(ratios):.2f} times tiktoken alone")
        print(f"peak memory: {max(peaks) >> 20} MiB, for {path.stat().st_size:,} bytes on {threads} threads")
        shutil.rmtree(FOLDER)
        saved = kill_and_resume(path, threads, tokens)
        assert digests() == found, f"{digests()} differ from {found}"
        print(f"killed after {saved:,} tokens and resumed: identical files, sha256 of train.bin {found['train.bin']}")
    finally:
        shutil.rmtree(scratch)
        shutil.rmtree(FOLDER, ignore_errors=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("megabytes", 1000), ("rounds", 3), ("threads", 2)):
        parser.add_argument(name, type=int, nargs="?", default=default)
    main(**vars(parser.parse_args()))
