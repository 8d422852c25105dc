"""The site: notebooks with their outputs, API reference from the comments behind parameters, cards of what is shipped, reports.

    python docs/make_site.py [folder]     needs the extra `docs`, and no network
"""
import ast
import hashlib
import io
import json
import posixpath
import re
import shutil
import sys
import tempfile
import tokenize
from html import escape
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
WINGS = {"tutorials": "Tutorials", "": "The package, page by page", "reading": "Reading files", "simulator": "The simulated Earth", "archives": "Published data sets",
         "encoders": "Encoders", "tuning": "Ways of tuning", "reporting": "Records and reports", "experiments": "Experiments"}  # folder of nbs -> heading, in reading order


# ---------------------------------------------------------------- notebooks

def pages(root=ROOT):
    "Notebooks of the site by folder, in the order of their numbers."
    found = {}
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        parts = path.relative_to(root / "nbs").parts
        if any(p.startswith((".", "_")) for p in parts) or path.name == "33_moved.ipynb": continue
        found.setdefault("/".join(parts[:-1]), []).append("/".join(parts))
    return found


class Links:
    "Links between files of the repository become links between pages, reports and files of the site."
    def __init__(self, stage, root=ROOT):
        self.stage, self.root, self.missing, self.copied = stage, root, [], set()

    def leads(self, target, page):
        "Where a link of a page leads on the site, seen from that page; None: leave it."
        path, hash_, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or not path: return None
        there = posixpath.normpath(posixpath.join("nbs", posixpath.dirname(page), path))
        up = "../" * page.count("/")
        if there in ("nbs", "README.md", "nbs/index.ipynb"): return f"{up}index.html"
        if there == "reports/README.md": there = "reports/index.html"
        source = self.root / there
        if not source.exists():
            self.missing.append(f"{page}: {target}")
            return None
        if there.startswith("nbs/") and there.endswith(".ipynb"): return f"{up}{there[4:-6]}.html{hash_}{anchor}"
        if source.is_dir(): return None
        if there.startswith("reports/"):
            self.copied.add(there)
            return up + there
        to = self.stage / "files" / there
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, to)
        return f"{up}files/{there}"

    def rewritten(self, text, page, example=False):
        "Markdown with its links led to the site; links in code are left. An example's own links may lead nowhere and become text."
        def image(m):
            to = self.leads(m[2], page)
            return m[0] if to is None else f'<img alt="{escape(m[1], quote=True)}" src="{to}">'
        def link(m):
            to = self.leads(m[2], page)
            said = re.sub(r"`([^`]+)`", lambda c: f"<code>{escape(c[1])}</code>", m[1])
            if to is None and example and self.missing and self.missing[-1] == f"{page}: {m[2]}":
                self.missing.pop()
                return m[1]
            return m[0] if to is None else f'<a href="{to}">{said}</a>'
        parts = re.split(r"(^```.*?^```)", text, flags=re.S | re.M)
        for i in range(0, len(parts), 2):
            parts[i] = re.sub(r"!\[([^\]]*)\]\(([^)\s]+)\)", image, parts[i])
            parts[i] = re.sub(r"(?<!!)\[((?:`[^`]*`|[^\]`])*)\]\(([^)\s]+)\)", link, parts[i])
        return "".join(parts)


def staged(path, page, links):
    "A notebook as readers see it: no directives, no cells that are hidden or empty."
    nb, cells = nbformat.read(path, 4), []
    for cell in nb.cells:
        if not cell.source.strip() or re.search(r"^#\| ?(hide|default_exp)", cell.source, re.M): continue
        if cell.cell_type == "markdown": cell.source = links.rewritten(cell.source, page)
        else:
            if re.search(r"^#\| ?echo: false", cell.source, re.M): cell.metadata["tags"] = ["remove-input"]
            cell.source = re.sub(r"^#\| ?\w+.*\n?", "", cell.source, flags=re.M).strip("\n")
            for output in cell.outputs:
                data = output.get("data", {})
                data.pop("application/vnd.jupyter.widget-view+json", None)
                if "text/markdown" in data: data["text/markdown"] = links.rewritten(data["text/markdown"], page, example=page != "index.ipynb")
        cells.append(cell)
    nb.cells = cells
    nb.metadata = {"kernelspec": nb.metadata.get("kernelspec", {"name": "python3", "display_name": "python3", "language": "python"}), "language_info": {"name": "python"}}
    if not any(c.cell_type == "markdown" and c.source.lstrip().startswith("# ") for c in nb.cells[:2]):
        nb.cells.insert(0, nbformat.v4.new_markdown_cell(f"# {path.stem}"))
    return nb


def contents(groups):
    "The navigation, as directives below the first page."
    return "\n\n".join("```{toctree}\n:caption: " + title + "\n:hidden:\n\n" + "\n".join(names) + "\n```" for title, names in groups if names)


# ---------------------------------------------------------------- reference

def modules(root=ROOT):
    "Names of the package's modules in the order of their pages."
    found = pages(root)
    names = []
    for folder in [*WINGS, *sorted({*found} - {*WINGS})]:
        if folder in ("experiments", "tutorials"): continue
        for page in found.get(folder, []):
            stem = Path(page).stem.partition("_")
            if stem[0].isdigit(): names.append((".".join([*folder.split("/"), stem[2]]).strip("."), page))
    return names


def cell(text): return str(text).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def comments_of(text):
    "Line number -> the comment on it."
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {t.start[0]: t.string.lstrip("# ").strip() for t in tokens if t.type == tokenize.COMMENT}


def described(name, level, node, args, comments, back=None):
    "Heading, signature, sentence and a row per parameter; `args` are (name, type, default)."
    call = ", ".join(n + (f"={d}" if d and len(d) < 40 else "=..." if d else "") for n, _, d, _ in args)
    lines = [f"{'#' * level} {name}", f"```python\n{name}({call})\n```", (ast.get_docstring(node) or "").replace("<", "&lt;")]
    rows = [(f"`{n}`", t, comments.get(line, "")) for n, t, _, line in args]
    if back is not None: rows.append(("returns", ast.unparse(back), comments.get(back.end_lineno, "")))
    if rows: lines.append("| | type | meaning |\n| --- | --- | --- |\n" + "\n".join(f"| {a} | {f'`{cell(b)}`' if b else ''} | {cell(c)} |" for a, b, c in rows))
    return lines


def arguments(f, method=False):
    "(name, type, default, line) of every parameter."
    a, said = f.args, lambda n: ast.unparse(n) if n is not None else ""
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    found = [(p.arg, said(p.annotation), said(d), p.end_lineno) for p, d in zip(plain, defaults)][method:]
    found += [(f"*{p.arg}", said(p.annotation), "", p.end_lineno) for p in filter(None, [a.vararg])]
    found += [(p.arg, said(p.annotation), said(d), p.end_lineno) for p, d in zip(a.kwonlyargs, a.kw_defaults)]
    return found + [(f"**{p.arg}", said(p.annotation), "", p.end_lineno) for p in filter(None, [a.kwarg])]


def reference(name, page, root=ROOT):
    "The reference of one module, from its source: nothing is imported."
    text = (root / "spectralmoe" / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
    tree, comments, constants = ast.parse(text), comments_of(text), []
    lines = [f"# spectralmoe.{name}", f"> {summary(tree)}", f'On the page <a href="../{page[:-6]}.html">{page[:-6]}</a>, with examples.']
    public = next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"), [])
    nodes = {n.name: n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    methods = {}
    for f in tree.body: # methods that were patched in belong to the class that their first parameter names
        if isinstance(f, ast.FunctionDef) and any("patch" in ast.unparse(d) for d in f.decorator_list) and f.args.args and f.args.args[0].annotation is not None:
            methods.setdefault(ast.unparse(f.args.args[0].annotation), []).append(f)
    for key in public:
        node = nodes.get(key)
        if node is None: constants.append(key)
        elif isinstance(node, ast.FunctionDef): lines += described(key, 2, node, arguments(node), comments, node.returns)
        else:
            own = [f for f in node.body if isinstance(f, ast.FunctionDef)]
            init = next((f for f in own if f.name == "__init__"), None)
            fields = [(n.target.id, ast.unparse(n.annotation), ast.unparse(n.value) if n.value else "", n.end_lineno) for n in node.body if isinstance(n, ast.AnnAssign)]
            lines += described(key, 2, node, arguments(init, True) if init else fields, comments)
            for f in [*own, *methods.get(key, [])]:
                if not f.name.startswith("_") and ast.get_docstring(f):
                    static = any("staticmethod" in ast.unparse(d) for d in f.decorator_list)
                    lines += described(f"{key}.{f.name}", 3, f, arguments(f, not static), comments, f.returns)
    if constants: lines.append("Constants: " + ", ".join(f"`{c}`" for c in constants) + ".")
    return "\n\n".join(lines) + "\n"


def summary(tree): return (ast.get_docstring(tree) or "").strip().replace("<", "&lt;")


# ---------------------------------------------------------------- cards

def digest(path): return hashlib.sha256(path.read_bytes()).hexdigest()


def section(text, title):
    "A section of markdown by its heading."
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.S | re.M)
    return found[1].strip() if found else ""


def model_card(folder):
    "The card that lies beside shipped weights, with the files and their hashes."
    text = re.sub(r"\A---\n.*?\n---\n", "", (folder / "README.md").read_text(encoding="utf-8"), flags=re.S)
    rows = "\n".join(f"| {f.name} | {f.stat().st_size / 1024:.0f} KiB | `{digest(f)[:16]}` |" for f in sorted(folder.iterdir()) if f.is_file())
    return f"{text.strip()}\n\n## Files\n\n| file | size | sha256 begins |\n| --- | --- | --- |\n{rows}\n"


def weights_data_card(folder):
    "What shipped weights were trained on, from the history beside them."
    plan = json.loads((folder / "history.json").read_text(encoding="utf-8"))["plan"]
    card, pool = (folder / "README.md").read_text(encoding="utf-8"), plan["pool"]
    n = pool["scenes"] * pool["groups"]
    facts = {"images": f"{n:,} simulated places of {pool['size']} px, each seen under two domains", "seed of the pool": pool["seed"],
             "made by": f"the simulator of spectralmoe {pool['version']}", "real images": "none", "class labels": "none",
             "batches": f"{plan['steps']:,} steps of {plan['tokens']:,} tokens", "licence": "no licence needed: rendered by the package, again on demand"}
    rows = "\n".join(f"| {k} | {v} |" for k, v in facts.items())
    return (f"# Data behind {folder.name}\n> What the shipped weights were pretrained on\n\n| | |\n| --- | --- |\n{rows}\n\n"
            f"## What was held out\n\n{section(card, 'What was held out')}\n\n## Limits\n\nNo camera took these images. What was learned from them is worth "
            "something on other scenes of the same simulator, and is no substitute for pretraining on real images.\n")


def task_card(path):
    "The data of one task, from the table the package ships."
    from spectralmoe.benchmarks import BENCHMARKS
    t, b = json.loads(path.read_text(encoding="utf-8")), BENCHMARKS[path.stem]
    simulated = b.world == "mini" or path.stem == "made_tiles"
    classes = "\n".join(f"| {i} | {c['name']} | `#{c['colour']}` | {', '.join(map(str, c.get('codes', c.get('simulated', []))))} |" for i, c in enumerate(t["classes"]))
    domains = "\n".join(f"| {d.name} | {'source' if d is b.source else 'target'} | {getattr(d.fed_sensor, 'name', '') or ''} | "
                        f"{sum(v.tiles for v in b.simulated.get(d.name, ())) or '-'} |" for d in b.domains)
    split = ", ".join(f"{k.replace('_', ' ')} {t[k]}" for k in ("crop", "steps", "batch_size", "lr", "train_tiles") if k in t)
    found = t.get("statistics")
    numbers = "" if not found else "\n\n## Statistics\n\n| band | mean | standard deviation |\n| --- | --- | --- |\n" + "\n".join(
        f"| {n} | {m:.5g} | {s:.5g} |" for n, m, s in zip(found["bands"], found["mean"], found["std"]))
    use = ("Rendered by the package on demand; nothing is downloaded. Figures on it compare methods under a shift that is known exactly, and say nothing about real images."
           if simulated else "Not shipped: the package holds classes, codes and statistics; the images come from their owners under their own licence.")
    return (f"# {t['name']}\n> {t['title']}\n\n{use}\n\n| | |\n| --- | --- |\n| origin | {cell(t.get('citation', ''))} |\n| licence | {cell(t.get('licence', 'see origin'))} |\n"
            f"| bands | {', '.join(t['bands'])} |\n| schedule | {split} |\n| file | {path.name}, sha256 begins `{digest(path)[:16]}` |\n\n"
            f"## Classes\n\n| index | name | colour | {'simulated classes' if b.world == 'mini' else 'codes in the masks'} |\n| --- | --- | --- | --- |\n{classes}\n\n"
            f"## Domains\n\n| domain | role | sensor | tiles |\n| --- | --- | --- | --- |\n{domains}{numbers}\n")


def cards(root=ROOT):
    "All cards: name of the page -> markdown."
    assets = [f for f in sorted((root / "spectralmoe" / "assets").iterdir()) if (f / "README.md").is_file()]
    found = {f"cards/models/{f.name}": model_card(f) for f in assets}
    found |= {f"cards/data/{f.name}": weights_data_card(f) for f in assets if (f / "history.json").is_file()}
    return found | {f"cards/data/{p.stem}": task_card(p) for p in sorted((root / "spectralmoe" / "tables").glob("*.json"))}


# ---------------------------------------------------------------- everything

def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def stage(to, only=None, api=None, root=ROOT):
    "Sources of the site in a folder; `only` and `api`: some pages and modules, for a test. Returns the links that were followed."
    links, found = Links(to, root), pages(root)
    wanted = [p for folder in [*WINGS, *sorted(set(found) - {*WINGS})] for p in found.get(folder, []) if only is None or p in only or p == "index.ipynb"]
    for page in wanted:
        nb = staged(root / "nbs" / page, page, links)
        (to / page).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, to / page)
    names = lambda folder: [p[:-6] for p in wanted if posixpath.dirname(p) == folder]
    groups = [("Start", ["troubleshooting"] if "troubleshooting.ipynb" in wanted else [])]
    groups += [(WINGS.get(f, f), [n for n in names(f) if n not in ("index", "troubleshooting")]) for f in [*WINGS, *sorted(set(found) - {*WINGS})]]
    said = lambda n: summary(ast.parse((root / "spectralmoe" / f"{n.replace('.', '/')}.py").read_text(encoding="utf-8")))
    listed = [(n, p) for n, p in modules(root) if (api is None or n in api)]
    for name, page in listed: write(to / "api" / f"{name}.md", reference(name, page, root))
    write(to / "api" / "index.md", "# API reference\n> From signatures and the comments behind parameters\n\n" + contents([("modules", [n for n, _ in listed])]) + "\n\n"
          + "\n".join(f'- <a href="{n}.html">spectralmoe.{n}</a>: {said(n)}' for n, _ in listed) + "\n")
    made = cards(root) if only is None else {}
    for name, text in made.items(): write(to / f"{name}.md", text)
    groups += [("Reference", ["api/index"]), ("Model cards", [n for n in made if "/models/" in n]), ("Data cards", [n for n in made if "/data/" in n])]
    index = nbformat.read(to / "index.ipynb", 4)
    index.cells.append(nbformat.v4.new_markdown_cell(contents(groups)))
    nbformat.write(index, to / "index.ipynb")
    return links


def make_site(to, only=None, api=None, root=ROOT):
    "Builds the site into a folder; nothing is asked of a network. Returns what was odd."
    from sphinx.application import Sphinx
    to = Path(to).resolve()
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "source"
        source.mkdir()
        links = stage(source, only, api, root)
        shutil.copytree(root / "docs" / "_static", source / "_static")
        built, odd = Path(work) / "site", (Path(work) / "odd.txt").open("w+", encoding="utf-8")
        app = Sphinx(source, root / "docs", built, Path(work) / "trees", "html", status=None, warning=odd, freshenv=True)
        app.build(force_all=True)
        odd.seek(0)
        problems = [re.sub(r"\x1b\[[\d;]*m", "", line).replace(f"{source}/", "").strip() for line in odd if line.strip()]
        if (source / "files").is_dir(): shutil.copytree(source / "files", built / "files")
        if only is None and (root / "reports").is_dir(): shutil.copytree(root / "reports", built / "reports", ignore=shutil.ignore_patterns("models", "maps", "*.log", ".*"))
        for name in links.copied if only is not None else ():
            (built / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, built / name)
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(built, to, ignore=shutil.ignore_patterns(".doctrees", ".buildinfo", "objects.inv"))
    return [f"leads nowhere: {m}" for m in links.missing] + problems


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "site")
    odd = make_site(folder)
    for line in odd: print(line, file=sys.stderr)
    count = len(list(folder.rglob("*.html")))
    print(f"written: {folder / 'index.html'} ({count} pages, {sum(f.stat().st_size for f in folder.rglob('*') if f.is_file()) / 2**20:.0f} MiB)")
    sys.exit(bool(odd))
