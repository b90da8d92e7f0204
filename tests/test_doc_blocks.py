"""Every fenced block of the documentation runs, or is checked, or says why not (see ``doc_blocks.py``)."""
import re

import pytest
from doc_blocks import ROOT, Page, blocks_of, check_command, check_types, words_of
from doc_worlds import WORLDS

from ewa3d import registry
from ewa3d.engine.schedules import SCHEDULES

PAGES = sorted({*ROOT.glob('*.md'), ROOT / 'data' / 'README.md', *(ROOT / 'docs').rglob('*.md'),
                *(ROOT / 'configs').rglob('*.md')})


def name(path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture
def kept_names():
    """What a page registers is gone afterwards."""
    registries = [registry.MODELS, registry.DATASETS, registry.TRANSFORMS]
    tables = [SCHEDULES, *(r.module_dict for r in registries if r.import_from_location() is None)]
    before = [dict(table) for table in tables]
    yield
    for table, names in zip(tables, before):
        table.clear()
        table.update(names)


@pytest.mark.parametrize('path', [path for path in PAGES if '```' in path.read_text(encoding='utf-8')], ids=name)
def test_page(path, tmp_path, monkeypatch, kept_names):
    monkeypatch.chdir(tmp_path)
    page = Page(path, {})
    if name(path) in WORLDS:
        WORLDS[name(path)](page, monkeypatch)
    page.go()
    if page.skipped:
        pytest.skip(f'the rest ran: {"; ".join(page.skipped)}')


@pytest.mark.parametrize('path', PAGES, ids=name)
def test_links_lead_somewhere(path):
    text = re.sub(r'```.*?^```', '', path.read_text(encoding='utf-8'), flags=re.DOTALL | re.MULTILINE)
    for target, anchor in re.findall(r'\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)', text):
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), f'{name(path)}: {target}'
        if anchor and file.suffix == '.md':
            headings = re.findall(r'^#+ (.+)$', file.read_text(encoding='utf-8'), re.MULTILINE)
            anchors = {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings}
            assert anchor in anchors, f'{name(path)}: {target}#{anchor}'


def test_there_are_pages_for_all_worlds():
    assert set(WORLDS) <= {name(path) for path in PAGES}


# ---- the tester itself ----------------------------------------------------------------------------------------------
def page_of(tmp_path, monkeypatch, text: str) -> Page:
    monkeypatch.setattr('doc_blocks.ROOT', tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'page.md').write_text(text)
    return Page(tmp_path / 'page.md', {})


def test_blocks_share_names_and_what_is_marked_is_left_alone(tmp_path, monkeypatch):
    page = page_of(tmp_path, monkeypatch, '```python\nx = 1\n```\n<!-- not run: says nothing -->\n```python\n'
                                          'x = 1 / 0\n```\n* item\n  ```python\n  x += 1\n  ```\n```text\n'
                                          'anything {\n```\n')
    page.go()
    assert page.names['x'] == 2
    assert [block.line for block in blocks_of(page.path)] == [2, 6, 10, 13]


@pytest.mark.parametrize('text, what', [
    ('```python\nx = 1 / 0\n```\n', 'page.md:2: ZeroDivisionError'),
    ('```python\nhook = dict(type="EWAHok")\n```\n', "no component 'EWAHok'"),
    ('```python\nhooks = [dict(type="EWAHook", rate=1)]\n```\n', "EWAHook takes no 'rate'"),
    ('```json\n{"a": }\n```\n', 'JSONDecodeError'),
    ('```\nx\n```\n', 'page.md:2'),
    ('```sh\newa3d tain configs/quickstart/ewa.py\n```\n', "no command 'tain'"),
    ('```sh\necho "x\n```\n', 'page.md:2'),
    ('<!-- run -->\n```sh\newa3d configs nothing-like-it\n```\n', 'exit code 1'),
])
def test_errors_are_told(tmp_path, monkeypatch, text, what):
    with pytest.raises(AssertionError) as error:
        page_of(tmp_path, monkeypatch, text).go()
    assert what in str(error.value)


@pytest.mark.parametrize('mark', ['not run', 'not run: ', 'skip'])
def test_a_mark_gives_a_reason(tmp_path, monkeypatch, mark):
    with pytest.raises(ValueError, match='the mark of a block is'):
        page_of(tmp_path, monkeypatch, f'<!-- {mark} -->\n```sh\nx\n```\n').go()


def test_words_are_those_of_the_shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words_of("A=1 python tools/x.py {a,b}.c='d e' && . v/bin/activate  # no") == [
        ['python', 'tools/x.py', 'a.c=d e', 'b.c=d e'], ['source', 'v/bin/activate']]
    assert words_of('ewa3d train CONFIG --seed S > out.txt') == [
        ['ewa3d', 'train', 'configs/quickstart/ewa.py', '--seed', '0']]


@pytest.mark.parametrize('command', [
    'python tools/tran.py configs/quickstart/ewa.py', 'python tools/train.py configs/quickstart/nothing.py',
    'python tools/train.py configs/quickstart/ewa.py --sed 0', 'ewa3d plot', 'make nothing', 'rm -r x',
    'python tools/train.py configs/quickstart/ewa.py --cfg-options model.hed.x=1', 'python -m antigravity',
    'python -m ewa3d.bench.clusters --nothing', "pip install 'ewa3d[all]'"])
def test_commands_that_do_not_exist(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((AssertionError, OSError, LookupError, TypeError, ValueError)):
        for words in words_of(command):
            check_command(words)


def test_types_are_looked_for_everywhere():
    check_types(dict(a=[dict(type='EWAFFN', at='x', num_experts=2), dict(b=dict(type='AdamW', lr=1.))], c=3))
    with pytest.raises(TypeError, match='num_expert'):
        check_types([dict(type='EWAFFN', at='x', num_expert=2)])
