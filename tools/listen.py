"""The listening test of Sec. 4.4: a page that plays pairs of clips blind, and the wins of Table 7.

    python tools/listen.py music generated riffusion -o listen.html   # or evaluate.py listen
    python tools/listen.py answers-ann.json answers-bob.json

Folders of clips of the same prompts, in the same order, become one page that needs neither server
nor network. It plays each pair of sources for each prompt, in random order and on random sides,
asks which clip the text describes better, and saves the answers as JSON, which are then counted.
"""

import base64
import io
import json
import math
import sys
from collections import Counter
from pathlib import Path

import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import noise2music as n2m
from evaluate import clips_of, excerpt, text_of
from sample import LENGTH
from t5_encoder import check, parse_json, regular, whole_file
from train import new_parser, number, run_command

TABLE_7 = {"MusicCaps": 959, "Noise2Music Waveform": 718, "MusicLM": 692, "Mubert": 254,
           "Riffusion": 308}  # wins, in 1.2k comparisons each


def page(args):
    """Sec. 4.4: "a text caption [...] and 10-second clips from two different sources"."""
    tracks = [clips_of(folder)[: args.limit] for folder in args.sources]
    sizes = [len(clips) for clips in tracks]
    check(len(set(sizes)) == 1, f"the folders hold {sizes} clips; give the same prompts, in order")
    prompts = []
    for n, clips in enumerate(zip(*tracks), 1):
        texts = {text for track in clips if (text := text_of(track))}
        check(len(texts) == 1, f"clip {n} has {len(texts)} prompts in these folders, not one: "
              f"{sorted(texts)}")
        prompts += texts

    def address(track) -> str:
        flac = io.BytesIO()  # loses nothing, and browsers play it
        soundfile.write(flac, excerpt(track, args.excerpt)[0], n2m.MEL_RATE, format="FLAC")
        return "data:audio/flac;base64," + base64.b64encode(flac.getvalue()).decode()

    data = {"sources": [str(folder) for folder in args.sources], "prompts": prompts,
            "clips": [[address(track) for track in clips] for clips in tracks]}
    text = json.dumps(data).replace("<", "\\u003c")  # no prompt ends the script
    html = Path(__file__).with_suffix(".html").read_text("utf-8")
    with whole_file(args.out) as file:
        file.write(html.replace("= CLIPS", f"= {text}").encode())
    print(f"{args.out}: {len(prompts)} prompts, {len(prompts) * math.comb(len(tracks), 2)} pairs; "
          "a browser opens it")


def wins(args):
    """Table 7: how often each source was found better. choice: slightly is enough, and no one wins
    where neither is better: Table 7's wins add up to 2,931 of 3k ratings."""
    won, compared = Counter(), Counter()
    for path in args.sources:
        try:
            for answer in parse_json(regular(path).read_bytes())["answers"]:
                a, b, score = answer["a"], answer["b"], answer["score"]
                check(isinstance(a, str) and isinstance(b, str), "no names")
                compared.update([a, b])
                won.update({a: score < 0, b: score > 0})
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: not what the page saves") from None
    for source, n in sorted(compared.items(), key=lambda item: -won[item[0]]):
        print(f"{source:30}{won[source]:6} wins in {n} comparisons")
    print("Table 7, in 1,200 each: " + ", ".join(f"{k} {n}" for k, n in TABLE_7.items()))


def parse_args(argv):
    parser = new_parser("listen.py", __doc__)
    add = parser.add_argument
    add("sources", type=Path, nargs="+", metavar="SOURCE", help="folders of clips, or answers")
    add("-o", "--out", type=Path, default=Path("listen.html"), metavar="FILE",
        help="default: listen.html")
    add("--excerpt", type=LENGTH, default=10, metavar="S", help="seconds of a clip (default: 10)")
    add("--limit", type=number(int, 1), default=20, metavar="N",
        help="the first N prompts (default: 20)")
    args = parser.parse_args(argv)
    if all(path.suffix == ".json" for path in args.sources):
        return wins, args
    if len(args.sources) < 2 or len({*args.sources}) < len(args.sources):
        parser.error("give two folders or more, each once")
    return page, args


def main(argv=None):
    run_command(*parse_args(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
