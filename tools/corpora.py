"""Vocabularies and evaluation sets, from the files in which their makers publish them.

    python tools/label.py vocabulary raters musiccaps-public.csv   # rater_lf.txt, rater_sf.txt
    python tools/label.py vocabulary songs songs.csv template.txt  # prompts.jsonl, for any LM
    python tools/label.py vocabulary answers answers.jsonl         # lamda_lf.txt, of its answers
    python tools/label.py audioset clips eval_segments.csv         # clips/metadata.jsonl

The first three write into ./vocabularies, or -o DIR.

Nothing is downloaded. MusicCaps (Google) is musiccaps-public.csv. AudioSet (Google) is
balanced_train_segments.csv, unbalanced_train_segments.csv and eval_segments.csv, each beside
class_labels_indices.csv. MagnaTagATune (City University of London) is annotations_final.csv.

LaMDA-LF (Sec. 3.5): songs.csv has the columns title and artist. The template is any text in which
{title} and {artist} stand for those; the paper's is in its App. C: twelve descriptions of songs,
and then the song in question. A language model adds an "answer" to each line of prompts.jsonl.

AudioSet: the clips with a label of App. D, of those that are in the folder: by YouTube id and
start in s or ms (`ID_30.wav`, `ID_30000.wav`), by start and end (`ID_30_40.wav`), or by the id
alone; each may begin with a `Y`. MuLaMCap (Sec. 3.5) is what label.py then makes of a folder for
training, and of another for evaluation:
    python tools/label.py ./clips --vocabulary long vocabularies/lamda_lf.txt \\
        --vocabulary long vocabularies/rater_lf.txt --vocabulary short vocabularies/rater_sf.txt \\
        --audio-embedder x:audio --text-embedder x:text
What is evaluated on MusicCaps is trained without Rater-LF (Sec. 3.6).
"""

import ast
import csv
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Callable, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from t5_encoder import check, parse_json, read_lines, whole_file
from train import AUDIO, new_parser


# ---- Files ----

AS_PUBLISHED = "give the file as its makers publish it"


def all_rows(path: Path, reader) -> list:
    """The rows that a csv reader makes of a file, or a ValueError where it can make none of one."""
    try:
        return list(reader)
    except csv.Error as error:
        raise ValueError(f"{path}: {error}; {AS_PUBLISHED}") from None


def read_csv(path: Path, columns: set[str], **kind) -> list[dict]:
    """The rows of a table with a header."""
    rows = all_rows(path, csv.DictReader([f"{line}\n" for line in read_lines(path)], **kind))
    check(rows, f"{path}: no rows in it")
    check(columns <= rows[0].keys(), f"{path}: lacks {', '.join(sorted(columns - rows[0].keys()))};"
          f" {AS_PUBLISHED}")
    for n, row in enumerate(rows, 1):
        check(all(row[column] is not None for column in columns),
              f"{path}: row {n} is cut off; {AS_PUBLISHED}")
    return rows


def read_json_lines(path: Path, texts: tuple[str, ...] = ()) -> list[dict]:
    """The objects of a file with one a line, each with the texts that are named."""
    entries, with_texts = [], f" with {', '.join(texts)}" if texts else ""
    for n, line in enumerate(read_lines(path), 1):
        try:
            entry = parse_json(line or "null")
            check(not line or isinstance(entry, dict)
                  and all(isinstance(entry.get(key), str) for key in texts), "")
            json.dumps(entry, ensure_ascii=False).encode()  # no half of a surrogate pair
            entries += [entry] if line else []
        except ValueError:
            raise ValueError(f"{path}:{n}: not a JSON object{with_texts}") from None
    return entries


def write_lines(files: dict):
    """{path: lines}: none is written if one is there."""
    for path in files:
        check(not path.exists(), f"{path}: there already; move it away")
    for path, lines in files.items():
        with whole_file(path) as file:
            file.writelines(f"{line}\n".encode() for line in lines)


# ---- Sentences ----

# Abbreviations that end no sentence; that end none before a lower-case letter; before a number.
NEVER = set("feat ft vs mr mrs ms dr st cf ca approx prod arr e.g i.e a.k.a".split())
SELDOM = set("etc min sec jr sr inc no op vol pt".split())
NUMBERED = set("no op vol pt".split())
# Words that begin a sentence: what else follows an initial goes on with the name.
FIRST = set("a an the this that these those it its he she they his her their there we you one some "
            "both each all no as at in on for with while when after and but so then".split())
# No word of `ends` has 40 letters. That bound, and marks taken whole, keep a run of 10,000 quick.
END = re.compile(r"""(?P<word>\S{0,40}?)(?<![.!?…])(?P<mark>[.!?…]++)(?P<quote>["'”’)\]]*)
                     (?:\s+|(?<=[a-z]{2}\.)(?=[A-Z][a-z]))(?=\W*(?P<next>\w+\.?))""", re.X)
QUOTED = re.compile(r'(?<!\w)"[^"]*"(?!\w)|“[^”]*”')


def ends(match: re.Match) -> bool:
    """Whether a sentence ends with this full stop, or mark."""
    word, following = match["word"].lstrip("([{\"'“‘").lower(), match["next"]
    if word in NEVER or word in NUMBERED and following[0].isdigit():  # "feat. X", "No. 5"
        return False
    if re.fullmatch(r"(?:[^\W\d_]\.)*[^\W\d_]", word):  # "J. S. Bach", "in C. The drums"
        return following.lower() in FIRST and not ("." in word and following[0].islower())
    if following[0].islower():  # raters do not always begin with a capital
        return match["mark"] == "." and not match["quote"] and word not in SELDOM
    return True


def sentences(text: str) -> list[str]:
    """The sentences of a caption. choice: a line break ends one; what is in quotes stays whole."""
    found = []
    for line in text.splitlines():
        line = re.sub(r"^(?:\d+[.)]|[-*•])\s+", "", line.strip())  # of a list
        line = line[1:-1] if re.fullmatch(r'"[^"]*"', line) else line
        quoted = [match.span() for match in QUOTED.finditer(line)]
        cuts = [match.end() for match in END.finditer(line) if ends(match)]
        cuts = [cut for cut in cuts if not any(a < cut < b for a, b in quoted)]
        found += [line[a:b] for a, b in zip([0, *cuts], [*cuts, len(line)])]
    return [" ".join(piece.split()) for piece in found if re.search(r"[^\W\d_]", piece)]


# ---- Vocabularies (Sec. 3.5) ----

def raters(path: Path):
    """Rater-LF and Rater-SF (Table 1): {file name: captions}, and what there is to say."""
    rows = read_csv(path, {"caption", "aspect_list"})
    split = [sentence for row in rows for sentence in sentences(row["caption"])]
    tags = []
    for n, row in enumerate(rows, 1):
        try:  # the list is printed as Python prints it
            check(isinstance(listed := ast.literal_eval(row["aspect_list"] or "[]"), list), "")
            tags += [" ".join(tag.split()) for tag in listed]
        except (ValueError, SyntaxError, TypeError, AttributeError):
            raise ValueError(f"{path}: row {n}: aspect_list is not a list of tags") from None
    # choice: each once
    long, short = ([*dict.fromkeys(text for text in texts if text)] for texts in (split, tags))
    return {"rater_lf.txt": long, "rater_sf.txt": short}, (
        f"{len(rows)} captions (10,028 in the paper), {len(split)} sentences (35,333), of them "
        f"{len(long)} different; {len(short)} different tags (23,906)")


def songs(path: Path, template: Path):
    """LaMDA-LF: a prompt for each song."""
    text = "\n".join(read_lines(template))
    check("{title}" in text and "{artist}" in text,
          f"{template}: says nowhere {{title}} or nowhere {{artist}}")
    fill = lambda song: re.sub(r"\{(title|artist)\}", lambda match: song[match[1]], text)
    rows = [{key: row[key].strip() for key in ("title", "artist")}
            for row in read_csv(path, {"title", "artist"})]
    lines = [json.dumps(song | {"prompt": fill(song)}) for song in rows]
    return {"prompts.jsonl": lines}, f"{len(lines)} songs (150k in the paper)"


WORDS = 4, 40  # choice: in a sentence of LaMDA-LF; a model reads 64 or 96 tokens (Table 2)


def normal_form(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def mentions(sentence: str, name: str) -> bool:
    """Whether a sentence has this title or artist in it. choice: a name of one word counts in
    capitals only, where it has them: a happy mood is not the song "Happy"."""
    words = re.findall(r"\w+", re.split(r" [-(\[]", name)[0])  # without "(Remastered)"
    pattern = r"(?<!\w)" + r"\W+".join(map(re.escape, words)) + r"(?!\w)"
    return bool(words) and any(
        len(words) > 1 or not found.islower() or name.islower()
        for found in re.findall(pattern, sentence, re.I))


def answers(path: Path):
    """LaMDA-LF: the clean sentences of a language model's answers, Sec. 3.5.

    choice: clean is whole, of 4 to 40 words, without the song's title and artist, and not one that
    is there already but for case and punctuation. choice: an answer ends with its line; a primed
    model goes on to other songs.
    """
    kept, dropped = {}, Counter()
    for song in read_json_lines(path, ("title", "artist", "answer")):
        first, *rest = song["answer"].strip().splitlines() or [""]
        dropped["after the first line"] += len(sentences("\n".join(rest)))
        artists = re.split(r", | & | feat\.? | ft\.? | featuring | and ", song["artist"])
        for sentence in sentences(first):
            form = normal_form(sentence)
            reasons = {
                "cut off": sentence.rstrip("\"'”’)]")[-1] not in ".!?…",
                "too short or long": not WORDS[0] <= len(form.split()) <= WORDS[1],
                "with a title or artist": any(mentions(sentence, name) for name in (
                    song["title"], song["artist"], *artists)),
                "there already": form in kept}
            if reason := next((reason for reason, holds in reasons.items() if holds), None):
                dropped[reason] += 1
            else:
                kept[form] = sentence
    why = ", ".join(f"{n} {reason}" for reason, n in dropped.most_common() if n) or "none"
    return {"lamda_lf.txt": [*kept.values()]}, (
        f"{len(kept)} sentences (4 million in the paper); dropped: {why}")


VOCABULARIES = {"raters": raters, "songs": songs, "answers": answers}


def vocabulary(args):
    made, said = VOCABULARIES[args.of](*args.files)
    write_lines({args.out / name: lines for name, lines in made.items()})
    print(f"{' and '.join(str(args.out / name) for name in made)}: {said}")


# ---- AudioSet (App. D) ----

MUSIC = "/m/04rlf"  # the root of the subtree, on half of all clips
# App. D, in its order: 130 of the 188 nodes below it (AudioSet's ontology, CC BY-SA 4.0). Where the
# text that was read had a one, these have an l, as in the ontology: /m/0192l 0gg8l 0l14_3 0l14gg
# 0l14jd 0l14j_ 0l14l2 0l14md 0l14qv 0l14t7 0l156b.
MUSIC_LABELS = """
    /m/0z9c /m/0mkg /m/042v_gx /m/0fd3y /t/dd00036 /m/025td0t /m/0192l /m/018j2 /m/0bm02 /m/018vs
    /m/02cz_7 /m/0395lw /m/0gg8l /m/0155w /m/0l14_3 /m/01kcd /m/015vgc /m/01xqw /m/02bk07 /m/0l14jd
    /m/02mscn /m/0140xf /m/01wy6 /m/0ggq0m /m/01lyv /m/0239kh /m/01qbl /m/0ggx5q /m/02bxd /m/026z9
    /m/02fsn /m/0283d /m/02hnl /m/02k_mr /m/026t6 /m/07s72n /m/02sgy /m/08cyft /m/02lkt /m/03xq_f
    /m/0m0jc /t/dd00035 /m/0326g /m/0l14j_ /m/02w4v /m/0319l /m/02x8m /t/dd00032 /m/0dwtp /m/0mbct
    /m/0dls3 /m/0342h /m/03gvt /t/dd00031 /m/03qjg /m/03m5k /m/03q5t /m/03lty /m/0glt670 /m/03mb9
    /m/05rwpb /m/03_d0 /m/03r5q_ /m/05148p4 /m/07pkxdp /m/0j45pbj /m/04rzd /m/0dwsp /m/06j64v
    /m/05fw6t /m/0164x2 /m/028sqc /m/0dq0md /m/0g293 /m/02v2lh /m/05pd6 /m/013y1f /m/0l14md /m/05r5c
    /m/0fx80y /m/064t9 /m/0dl5d /m/05w3f /m/05r6t /m/05r5wn /m/06cqb /m/06j6l /m/03t3fj /m/07sbbz2
    /m/06by7 /t/dd00033 /m/0ln16 /m/06ncr /t/dd00037 /m/01hgjl /m/0l14l2 /m/0l14t7 /m/0jtg0 /m/06rqw
    /m/06rvn /m/0gywn /m/0l14gg /m/06w87 /m/0l156b /m/02qmj0d /m/07s0s5r /m/015y_n /m/0l14qv
    /m/01p970 /m/07brj /m/01glhc /m/07gxw /t/dd00034 /m/02cjck /m/07kc_ /m/011k_j /m/02p0sh1
    /m/07lnk /m/07c6l /m/07gql /m/016622 /m/07xzm /m/0dwt5 /m/01z7dr /m/07y_7 /m/0y4f8 /m/04wptg
    /m/085jw /m/01sm1g /m/01bns_
""".split()
MULAMCAP = {"training": 388_262, "evaluation": 4_497}  # Sec. 3.5


class Segment(NamedTuple):
    ytid: str
    start: float  # seconds
    end: float
    labels: list[str]  # ids


def read_segments(path: Path):
    """The clips of one of AudioSet's CSVs; lines of comment begin with #."""
    rows = all_rows(path, csv.reader(read_lines(path), skipinitialspace=True))
    for n, row in enumerate(rows, 1):
        if row and not row[0].startswith("#"):
            try:
                ytid, start, end, labels = row
                yield Segment(ytid, float(start), float(end), labels.split(","))
            except ValueError:
                raise ValueError(f"{path}:{n}: not a YouTube id, a start, an end and labels; "
                                 f"{AS_PUBLISHED}") from None


def class_names(path: Path) -> dict[str, str]:
    """{id: name} of the class list beside a file of segments."""
    rows = read_csv(path.with_name("class_labels_indices.csv"), {"mid", "display_name"})
    return {row["mid"]: row["display_name"] for row in rows}


def music_of(segment: Segment, names: dict[str, str]) -> list[str]:
    """The names of a clip's labels that App. D has, in its order."""
    return [names.get(label, label) for label in MUSIC_LABELS if label in segment.labels]


def audio_files(folder: Path) -> dict[str, Path]:
    """{name without suffix: path below the folder} of the audio in it."""
    check(folder.is_dir(), f"{folder}: no such folder; give one of audio")
    return {path.stem: path.relative_to(folder) for path in sorted(folder.rglob("*"))
            if path.suffix.lower() in AUDIO}


def clip_file(files: dict[str, Path], ytid: str, start: float, end: float) -> Path | None:
    """The file of a YouTube clip, by the names that scripts which fetch them give."""
    forms = ("{:g}".format, "{:.3f}".format, lambda t: f"{1000 * t:.0f}")
    times = ["", *(t for f in forms for t in (f"_{f(start)}", f"_{f(start)}_{f(end)}"))]
    return next((files[name] for prefix in ("", "Y") for time in times
                 if (name := f"{prefix}{ytid}{time}") in files), None)


def audioset(args):
    """metadata.jsonl of the music in a folder. Its labels are kept, but are no captions: MuLaMCap
    has none but the pseudo-labels (and what a file's own header says, if it has one)."""
    files, lines, sizes = audio_files(args.folder), [], Counter()
    for path in args.segments:
        part = "evaluation" if path.name.startswith("eval") else "training"
        names = class_names(path)
        for segment in read_segments(path):
            if labels := music_of(segment, names):
                sizes[part] += 1
                if audio := clip_file(files, *segment[:3]):
                    lines.append(json.dumps({"audio": str(audio), "labels": labels}))
    check(lines, f"{args.folder}: holds none of the {sizes.total()} clips with music")
    write_lines({args.folder / "metadata.jsonl": lines})
    listed = ", ".join(f"{n:,} for {part} (MuLaMCap: {MULAMCAP[part]:,})"
                       for part, n in sizes.items())
    print(f"{args.folder / 'metadata.jsonl'}: {len(lines):,} clips, of the music that is listed: "
          f"{listed}")


# ---- Evaluation sets (Sec. 4.3.3) ----

def magnatagatune(path: Path, folder: Path | None):
    """"We concatenate the music tags". choice: of every clip that has one, or more."""
    for row in read_csv(path, {"clip_id", "mp3_path"}, delimiter="\t"):
        if tags := [tag for tag, held in row.items() if held == "1" and tag != "clip_id"]:
            audio = folder and (folder / row["mp3_path"]).is_file() and row["mp3_path"]
            yield {"tags": tags}, audio


def audioset_music_eval(path: Path, folder: Path | None):
    """"We use the concatenated labels". choice: of clips with Music and labels of App. D, and no
    others: 1,595 are listed in eval_segments.csv; 4,968 have any of App. D's labels."""
    names, files = class_names(path), audio_files(folder) if folder else {}
    for segment in read_segments(path):
        tags = music_of(segment, names)
        if tags and MUSIC in segment.labels and len(segment.labels) == len(tags) + 1:
            yield {"tags": tags}, clip_file(files, *segment[:3])


def musiccaps(path: Path, folder: Path | None):
    """"We use the rater captions as text prompts"."""
    files = audio_files(folder) if folder else {}
    for n, row in enumerate(read_csv(path, {"ytid", "start_s", "end_s", "caption"}), 1):
        try:
            times = float(row["start_s"]), float(row["end_s"])
        except ValueError as error:
            raise ValueError(f"{path}: row {n}: {error}; {AS_PUBLISHED}") from None
        if caption := " ".join(row["caption"].split()):
            yield {"long": caption}, clip_file(files, row["ytid"], *times)


class PromptSet(NamedTuple):
    name: str  # as Tables 5 and 6 print it
    entries: Callable  # (file, folder) -> (line of captions.jsonl, the audio below the folder)
    size: str
    seconds: int  # to generate
    excerpt: int  # to compare, from the middle


SETS = {
    "mtat": PromptSet("MagnaTagATune", magnatagatune, "21,638", 29, 29),
    "audioset": PromptSet("AudioSet-Music-Eval", audioset_music_eval, "1,482", 30, 10),
    "musiccaps": PromptSet("MusicCaps", musiccaps, "5.5K", 30, 10),
}


def prompts(args):
    """Without the audio, a prompt a line; with it, the captions.jsonl of the folder."""
    which = SETS[args.set]
    entries = list(which.entries(args.file, args.clips))
    if args.clips:
        out = args.clips / "captions.jsonl"
        found = [{"audio": str(audio)} | entry for entry, audio in entries if audio]
    else:
        out = Path(f"{args.set}.jsonl")
        found = [{"prompt": entry.get("long") or ", ".join(entry["tags"]),
                  "seconds": which.seconds} for entry, _ in entries]
    check(found, f"{args.clips or args.file}: holds none of the {len(entries)} clips")
    write_lines({out: map(json.dumps, found)})
    print(f"{out}: {len(found):,} of {len(entries):,} prompts of {which.name} ({which.size} in the "
          f"paper); sample.py takes --seconds {which.seconds}, evaluate.py --excerpt "
          f"{which.excerpt}")


# ---- Command line of `label.py vocabulary` and `label.py audioset` ----

COMMANDS = {"vocabulary": vocabulary, "audioset": audioset}


def parse_args(command: str, argv):
    parser = new_parser(f"label.py {command}", __doc__)
    add = parser.add_argument
    if command == "audioset":
        add("folder", type=Path, metavar="DIR", help="the clips that you have")
        add("segments", type=Path, nargs="+", metavar="CSV", help="*_segments.csv, of AudioSet")
        return parser.parse_args(argv)
    add("of", choices=VOCABULARIES, help="whose captions")
    add("files", type=Path, nargs="+", metavar="FILE", help="see above")
    add("-o", "--out", type=Path, default=Path("vocabularies"), metavar="DIR",
        help="default: vocabularies")
    args = parser.parse_args(argv)
    if len(args.files) != (2 if args.of == "songs" else 1):
        parser.error(f"{args.of} takes {'SONGS.csv TEMPLATE' if args.of == 'songs' else 'a file'}")
    return args
