"""vLLM's part of generation.py, which starts it in the environment that has vLLM: prints tokens per second as JSON."""

import json
import os
import statistics
import sys
import time


def main() -> None:
    settings = json.loads(sys.argv[1])
    # On CPUs: all cores for the arithmetic.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0)))))
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=settings["model"], dtype=settings["dtype"], max_model_len=settings["length"],
        max_num_seqs=settings["batch"], enable_prefix_caching=False, skip_tokenizer_init=True,
        kv_cache_memory_bytes=2 * 2**30,
    )  # fmt: skip
    new = settings["length"] - 1
    prompts = [{"prompt_token_ids": [token]} for token in range(1000, 1000 + settings["batch"])]
    parameters = SamplingParams(temperature=1.0, max_tokens=new, ignore_eos=True, detokenize=False)
    seconds = []
    for _ in range(settings["repeats"] + 1):  # the first one does not count
        began = time.perf_counter()
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        seconds.append(time.perf_counter() - began)
        assert all(len(output.outputs[0].token_ids) == new for output in outputs)
    rate = settings["batch"] * new / statistics.median(seconds[1:])
    print(json.dumps({"tokens_per_second": rate}))


if __name__ == "__main__":
    main()
