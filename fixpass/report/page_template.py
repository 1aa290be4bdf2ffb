"""The template of the HTML report. It loads nothing: style and script are in the page."""

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>fixpass: {{ report.title }}</title>
<style>
:root { color-scheme: light dark; --bg: #fff; --fg: #1b1f24; --dim: #57606a; --line: #d0d7de;
  --good: #116329; --bad: #a40e26; --good-bg: #dafbe1; --bad-bg: #ffebe9; --read: #0969da; }
@media (prefers-color-scheme: dark) { :root { --bg: #0d1117; --fg: #e6edf3; --dim: #9da7b3;
  --line: #30363d; --good: #56d364; --bad: #ff8f88; --good-bg: #12361d; --bad-bg: #4a1618;
  --read: #58a6ff; } }
body { margin: 0 auto; max-width: 75rem; padding: 1rem; background: var(--bg); color: var(--fg);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
code, .graph { font: 0.8rem/1.45 ui-monospace, monospace; }
.dim { color: var(--dim); }
.lead { font-size: 1.15rem; }
details { border: 1px solid var(--line); border-radius: 6px; margin: 0.4rem 0;
  padding: 0.3rem 0.7rem; content-visibility: auto; contain-intrinsic-size: auto 2.2rem; }
summary { cursor: pointer; }
:focus-visible { outline: 2px solid var(--read); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: 0.2rem 0.5rem; text-align: left;
  vertical-align: top; }
.holds { color: var(--good); }
.fails, .missed, .failed { color: var(--bad); }
.graph td { white-space: pre-wrap; width: 50%; border: 0; padding: 0 0.5rem; }
.graph .delete td:first-child, .graph .replace td:first-child { background: var(--bad-bg); }
.graph .insert td:last-child, .graph .replace td:last-child { background: var(--good-bg); }
svg { width: 100%; height: 1.4rem; background: var(--line); border-radius: 3px; display: block; }
svg rect { fill: var(--read); }
input[type=search] { width: 100%; max-width: 30rem; padding: 0.4rem; font: inherit;
  box-sizing: border-box; }
</style>
</head>
<body>
<main>
<h1>{{ report.title }}</h1>
<p class="lead">{{ report.summary or "No norm kernel was chosen." }}</p>
<nav aria-label="Parts of the report">
<a href="#sites">Sites</a> · <a href="#passes">Passes</a></nav>

<h2 id="sites">Sites</h2>
<p><label for="filter">Show the sites that contain this text (press / to write here)</label><br>
<input id="filter" type="search" autocomplete="off">
<label><input id="missed" type="checkbox"> only sites with a missed rewrite</label></p>
<p id="count" role="status">{{ sites|length }} sites</p>
{% for site in sites %}
<details class="site" data-missed="{{ site.is_missed|int }}">
<summary><code>{{ site.where }}</code>
<b>{{ site.kernel }}</b>
{% for norm, kernel in site.norms[-1:] %}
<span class="dim">{{ norm.layout }}</span>
{% endfor %}
{% if site.is_missed %}
<span class="missed">missed</span>
{% endif %}</summary>
{% set line = site.remarks[0].line %}
{% if line %}
<p>{{ line }} <code>{{ line.code }}</code><br><span class="dim">{{ line.short_path }}</span></p>
{% endif %}
<ul>
{% for remark in site.remarks %}
<li><span class="dim">{{ remark.pass_name }}</span>
<b class="{{ remark.kind }}">{{ remark.kind }}</b> {{ remark.text }}</li>
{% endfor %}
</ul>
{% for norm, kernel in site.norms %}
<h3>{{ norm.op }} <code>{{ norm.node }}</code></h3>
{% if norm.spans %}
{% set total = norm.spans[-1][0] + norm.spans[-1][1] %}
<svg viewBox="0 0 {{ total }} 10" preserveAspectRatio="none" role="img"
 aria-label="Memory of the first {{ norm.spans|length }} rows">
{% for start, length in norm.spans %}<rect x="{{ start }}" width="{{ length }}" height="10"/>
{% endfor %}</svg>
<p class="dim">The bar is {{ "{:,}".format(total * norm.itemsize) }} bytes of memory. The coloured
parts are the first {{ norm.spans|length }} rows of
{{ "{:,}".format(norm.shape[-1]) }} {{ norm.dtype }} elements.</p>
{% endif %}
<div class="scroll"><table>
<thead><tr><th>kernel</th><th>contract</th><th>cost</th></tr></thead>
<tbody>
{% for row in norm.kernels %}
<tr><td>{% if row.name == kernel %}<b>{{ row.name }}</b> (chosen){% else %}{{ row.name }}{% endif %}
</td><td>
{% for text, answer in row.constraints %}
<span class="{{ 'holds' if answer else 'fails' }}">{{ '✓' if answer else '✗' }} {{ text
}}{{ ' (not proved)' if answer is none }}</span><br>
{% else %}any layout{% endfor %}
</td><td>{{ row.cost }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
</details>
{% endfor %}

<h2 id="passes">Passes</h2>
{% for graph in graphs %}
<h3>The {{ graph.stage }} graph</h3>
{% for step in graph.steps %}
{% set rows = rows_of(step) %}
<details><summary>{{ step.pass_name }}
<span class="dim">{{ "%.1f"|format(step.milliseconds) }} ms{{
 ", the graph stays as it was" if not rows }}</span></summary>
<div class="scroll"><table class="graph">
<thead><tr><th>before</th><th>after</th></tr></thead><tbody>
{% for row in rows %}
<tr class="{{ row.kind }}"><td>{{ row.left }}</td><td>{{ row.right }}</td></tr>
{% endfor %}
</tbody></table></div></details>
{% endfor %}
{% endfor %}
</main>
<script>
const filter = document.getElementById("filter"), missed = document.getElementById("missed");
const sites = [...document.querySelectorAll(".site")];
const texts = sites.map((site) => site.textContent.toLowerCase());
function show() {
  const wanted = filter.value.toLowerCase();
  let count = 0;
  sites.forEach((site, i) => {
    site.hidden = !texts[i].includes(wanted) || (missed.checked && site.dataset.missed === "0");
    count += site.hidden ? 0 : 1;
  });
  document.getElementById("count").textContent = `${count} of ${sites.length} sites`;
}
filter.addEventListener("input", show);
missed.addEventListener("change", show);
addEventListener("keydown", (event) => {
  if (event.key === "/" && event.target !== filter) { event.preventDefault(); filter.focus(); }
});
</script>
</body>
</html>
"""
