"""Train the tokenizer of `emoji-diffusion` and of both CLIPs: lower-case byte-pair encoding, words of all captions.

python tasks/t2i/train_tokenizer.py CACHE
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from data import BACKGROUNDS, HERE, SCALES, load
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

TOKENS = 2048
CONTEXT = 16
START, END = "<|startoftext|>", "<|endoftext|>"


def main() -> None:
    """Train and write weights/emoji-diffusion/tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    drawings = load(parser.parse_args().cache)
    # things that are drawn, and the words for looks, count more than the names of all other emoji
    weight = [20] * drawings.things + [1] * (len(drawings.captions) - drawings.things)
    texts = [
        name for names, n in zip(drawings.captions, weight, strict=True) for name in names for _ in range(n)
    ]
    texts += [
        f"{size} on a {colour} background" for size in SCALES for colour in BACKGROUNDS for _ in range(20)
    ]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=TOKENS - 2, min_frequency=1, initial_alphabet=alphabet,
                                  end_of_word_suffix="</w>", show_progress=False)  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    # CLIP's layout: bytes, bytes that end a word, merges, then start and end, so that the end has the highest number
    words = alphabet + [b + "</w>" for b in alphabet]
    for left, right in merges:
        if (word := left + right) not in words:
            words.append(word)
    words = words[: TOKENS - 2]
    known = set(words)
    merges = [(a, b) for a, b in merges if {a, b, a + b} <= known]
    vocab = {word: i for i, word in enumerate([*words, START, END])}
    folder = HERE / "weights/emoji-diffusion/tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    special = {"unk_token": END, "bos_token": START, "eos_token": END, "pad_token": END}
    tokenizer = CLIPTokenizer(vocab, merges, **special, model_max_length=CONTEXT)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    again = CLIPTokenizer.from_pretrained(folder)
    print(len(vocab), again.model_max_length, again.eos_token_id)
    for text in ("tiger", "Red apple", "small tiger on a blue background", "a squirrel, perhaps", "", "🐯"):
        print(text, again(text).input_ids, again.tokenize(text))
    long = [n for names in drawings.captions for n in names if len(again(n).input_ids) > CONTEXT]
    print("cut:", long, "most:", max(len(again(n).input_ids) for names in drawings.captions for n in names))


if __name__ == "__main__":
    main()
