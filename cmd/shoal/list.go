package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"text/template"
	"time"
	"unicode/utf8"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/shoalnet/shoal/spec"
)

// listing is what every ls shares: a table, -o json or wide, -q, --filter and
// --format, as Docker has them.
type listing[T any] struct {
	columns []column[T]
	id      func(T) string
	json    func(T) (any, error)
	// filters match one value of a --filter key. Of one key any value may
	// match, but labels must all.
	filters map[string]func(v T, value string) bool
	labels  func(T) map[string]string
	values  map[string][]string       // all that a filter's value can be, where that is known
	fields  map[string]func(T) string // further ones of --format: Docker's names

	quiet  bool
	whole  bool // nothing is shortened
	want   []string
	format string
}

type column[T any] struct {
	head string // also the field of --format, in Docker's spelling, without spaces
	wide bool
	text func(T) string
}

// add gives a command its flags.
func (l *listing[T]) add(c *cli, cmd *cobra.Command) {
	keys := slices.Sorted(maps.Keys(l.filters))
	if l.labels != nil {
		keys = append(keys, "label")
	}
	cmd.Flags().BoolVarP(&l.quiet, "quiet", "q", false, "IDs only")
	cmd.Flags().BoolVar(&l.whole, "no-trunc", false, "shorten nothing")
	cmd.Flags().StringArrayVarP(&l.want, "filter", "f", nil, "only those with KEY=VALUE (repeatable); keys: "+strings.Join(keys, ", "))
	var fields []string
	for _, col := range l.columns {
		fields = append(fields, field(col.head))
	}
	fields = append(fields, slices.Sorted(maps.Keys(l.fields))...)
	cmd.Flags().StringVar(&l.format, "format", "", "Go template for each, with ."+strings.Join(fields, ", .")+"; or json")
	completeFilter(cmd, keys, func(key string) ([]string, bool) {
		if key == "node" {
			m, err := c.nodeNames(cmd.Context())
			return slices.Sorted(maps.Values(m)), err == nil
		}
		if key == "network" {
			m, err := c.networkNames(cmd.Context())
			return slices.Sorted(maps.Values(m)), err == nil
		}
		if key == "service" {
			m, err := c.serviceNames(cmd.Context())
			return slices.Sorted(maps.Values(m)), err == nil
		}
		v, ok := l.values[key]
		return v, ok
	})
	c.outputFlag(cmd, "json", "wide")
}

// completeFilter completes --filter: a key with its =, then what it can be.
func completeFilter(cmd *cobra.Command, keys []string, values func(key string) ([]string, bool)) {
	_ = cmd.RegisterFlagCompletionFunc("filter", func(_ *cobra.Command, _ []string, begun string) ([]string, cobra.ShellCompDirective) {
		key, _, ok := strings.Cut(begun, "=")
		if !ok {
			return each1(keys, func(k string) string { return k + "=" }), cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
		}
		vs, _ := values(key)
		return each1(vs, func(v string) string { return key + "=" + v }), cobra.ShellCompDirectiveNoFileComp
	})
}

func each1[A, B any](in []A, fn func(A) B) []B {
	var out []B
	for _, a := range in {
		out = append(out, fn(a))
	}
	return out
}

// field is a column's name in a template: "VIRTUAL IP" → "VirtualIP".
func field(head string) string {
	var b strings.Builder
	for _, w := range strings.Fields(head) {
		if len(w) <= 3 && w != "AGE" {
			b.WriteString(w)
		} else {
			b.WriteString(w[:1] + strings.ToLower(w[1:]))
		}
	}
	return b.String()
}

// filtered keeps what the filters match.
func (l *listing[T]) filtered(cmd *cobra.Command, all []T) ([]T, error) {
	byKey := map[string][]string{}
	for _, f := range l.want {
		k, v, ok := strings.Cut(f, "=")
		if _, known := l.filters[k]; !ok || (!known && (k != "label" || l.labels == nil)) {
			keys := slices.Sorted(maps.Keys(l.filters))
			if l.labels != nil {
				keys = append(keys, "label")
			}
			return nil, usageError(cmd, fmt.Errorf("filter %q: want KEY=VALUE, with one of the keys %s", f, strings.Join(keys, ", ")))
		}
		if ok := l.values[k]; ok != nil && !slices.Contains(ok, v) {
			return nil, usageError(cmd, fmt.Errorf("filter %q: %s is one of %s", f, k, strings.Join(ok, ", ")))
		}
		byKey[k] = append(byKey[k], v)
	}
	var out []T
	for _, v := range all {
		keep := true
		for k, values := range byKey {
			if k == "label" {
				for _, want := range values {
					keep = keep && hasLabel(l.labels(v), want)
				}
			} else {
				keep = keep && slices.ContainsFunc(values, func(want string) bool { return l.filters[k](v, want) })
			}
		}
		if keep {
			out = append(out, v)
		}
	}
	return out, nil
}

// hasLabel tells whether labels have KEY, or KEY=VALUE.
func hasLabel(labels map[string]string, want string) bool {
	key, value, pair := strings.Cut(spec.Text(want), "=")
	have, ok := labels[key]
	return ok && (!pair || have == value)
}

// isTable tells whether print shows people a table, not scripts their fields.
func (l *listing[T]) isTable(c *cli) bool {
	return c.output != "json" && !l.quiet && (l.format == "" || l.format == "table")
}

// print filters and shows.
func (l *listing[T]) print(c *cli, cmd *cobra.Command, all []T) error {
	vs, err := l.filtered(cmd, all)
	if err != nil {
		return err
	}
	switch {
	case c.output == "json":
		js, err := each(vs, l.json)
		if err != nil {
			return err
		}
		return c.json(js)
	case l.quiet:
		for _, v := range vs {
			fmt.Fprintln(c.out, l.id(v))
		}
		return nil
	case l.format == "json":
		for _, v := range vs {
			j, err := l.json(v)
			if err != nil {
				return err
			}
			b, err := json.Marshal(j)
			if err != nil {
				return err
			}
			fmt.Fprintf(c.out, "%s\n", b)
		}
		return nil
	case l.format != "" && l.format != "table":
		return l.template(c, cmd, vs)
	}
	var rows [][]string
	var head []string
	for _, col := range l.columns {
		if !col.wide || c.output == "wide" {
			head = append(head, col.head)
		}
	}
	rows = append(rows, head)
	for _, v := range vs {
		var row []string
		for _, col := range l.columns {
			if !col.wide || c.output == "wide" {
				row = append(row, col.text(v))
			}
		}
		rows = append(rows, row)
	}
	if c.output != "wide" {
		width, terminal := c.width()
		rows = fit(rows, width, terminal)
	}
	c.table(rows)
	return nil
}

// standardWidth is a line where nobody says how long one is.
const standardWidth = 80

// width is that of the terminal the output goes to.
func (c *cli) width() (columns int, terminal bool) {
	f, ok := c.out.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return standardWidth, false
	}
	if w, _, err := term.GetSize(int(f.Fd())); err == nil && w > 0 {
		return w, true
	}
	return standardWidth, true
}

const (
	minNote = 26 // columns for the free text in the last one, before others give way
	minCell = 12 // of others
)

// fit makes a table, a heading and rows, as wide as a terminal. The free text of a
// last column NOTE goes on in further lines, since its end is where the reason
// stands; other cells are shortened. For scripts all of it stays as it is.
func fit(rows [][]string, width int, people bool) [][]string {
	if len(rows) == 0 || !people {
		return rows
	}
	last := len(rows[0]) - 1
	note := rows[0][last] == "NOTE"
	widths := make([]int, len(rows[0]))
	total := -2
	for i := range widths {
		for _, r := range rows {
			widths[i] = max(widths[i], utf8.RuneCountInString(r[i]))
		}
		if note && i == last {
			widths[i] = min(widths[i], minNote)
		}
		total += widths[i] + 2
	}
	for total > width {
		widest, before := -1, total
		for j := range widths {
			if (!note || j != last) && widths[j] > minCell && (widest < 0 || widths[j] > widths[widest]) {
				widest = j
			}
		}
		if widest >= 0 {
			n := max(minCell, widths[widest]-(total-width))
			for _, r := range rows {
				r[widest] = clip(r[widest], n)
			}
			total -= widths[widest] - n
			widths[widest] = n
		}
		if total == before {
			break
		}
	}
	if !note {
		return rows
	}
	room := max(minNote, width-total+widths[last])
	var out [][]string
	for _, r := range rows {
		for i, line := range wrap(r[last], room) {
			if i > 0 {
				r = make([]string, len(r))
			}
			r = append(slices.Clone(r[:last]), line)
			out = append(out, r)
		}
	}
	return out
}

// wrap breaks text into lines of at most n characters, at spaces where it has any.
// There is always a first line.
func wrap(text string, n int) []string {
	lines := []string{""}
	for _, w := range strings.Fields(text) {
		line := &lines[len(lines)-1]
		switch length := utf8.RuneCountInString(*line); {
		case length == 0:
			*line = w
		case length+1+utf8.RuneCountInString(w) <= n:
			*line += " " + w
		default:
			lines = append(lines, w)
		}
		for r := []rune(lines[len(lines)-1]); len(r) > n; r = r[n:] {
			lines[len(lines)-1] = string(r[:n])
			lines = append(lines, string(r[n:]))
		}
	}
	return lines
}

// template shows each by a template; one that begins with "table " gets a
// heading, as in Docker.
func (l *listing[T]) template(c *cli, cmd *cobra.Command, vs []T) error {
	text, table := strings.CutPrefix(l.format, "table ")
	text = strings.NewReplacer(`\t`, "\t", `\n`, "\n").Replace(text)
	t, err := newTemplate(text)
	if err != nil {
		return usageError(cmd, err)
	}
	line := func(m row) ([]string, error) {
		var b bytes.Buffer
		if err := t.Execute(&b, m); err != nil {
			return nil, usageError(cmd, fmt.Errorf("--format %q: %w", l.format, err))
		}
		return strings.Split(b.String(), "\t"), nil
	}
	var rows [][]string
	if table {
		m := row{"Labels": "LABELS"}
		for f := range l.fields {
			m[f] = strings.ToUpper(f)
		}
		for _, col := range l.columns {
			m[field(col.head)] = col.head
		}
		head, err := line(m)
		if err != nil {
			return err
		}
		rows = append(rows, head)
	}
	for _, v := range vs {
		m := row{}
		for f, text := range l.fields {
			m[f] = text(v)
		}
		for _, col := range l.columns {
			m[field(col.head)] = col.text(v)
		}
		if l.labels != nil {
			m["Labels"], m[labelsOf] = labelText(l.labels(v)), l.labels(v)
		}
		row, err := line(m)
		if err != nil {
			return err
		}
		if rows = append(rows, row); !table {
			fmt.Fprintln(c.out, strings.Join(row, "\t"))
		}
	}
	if table {
		c.table(rows)
	}
	return nil
}

// row is what a template sees of one thing.
type row map[string]any

// labelsOf is where a row keeps its labels for Label.
const labelsOf = ""

// Label is one label's value, as in Docker: {{.Label "tier"}}.
func (r row) Label(key string) string {
	m, _ := r[labelsOf].(map[string]string)
	return spec.Raw(m[spec.Text(key)])
}

// newTemplate parses a --format, with Docker's functions.
func newTemplate(text string) (*template.Template, error) {
	t, err := template.New("format").Option("missingkey=error").Funcs(template.FuncMap{
		"json": func(v any) (string, error) {
			if r, ok := v.(row); ok {
				r = maps.Clone(r)
				delete(r, labelsOf)
				v = r
			}
			var b bytes.Buffer
			e := json.NewEncoder(&b)
			e.SetEscapeHTML(false)
			err := e.Encode(v)
			return strings.TrimSuffix(b.String(), "\n"), err
		},
		"upper": strings.ToUpper, "lower": strings.ToLower, "join": strings.Join, "split": strings.Split, "println": fmt.Sprintln,
	}).Parse(text)
	if err != nil {
		return nil, fmt.Errorf("--format: %w", err)
	}
	return t, nil
}

// inspectFlags are those of every inspect.
func (c *cli) inspectFlags(cmd *cobra.Command) {
	cmd.Flags().StringP("format", "f", "", "Go template for each, with the names of the JSON form in Go's spelling, like {{.Name}}, or with Docker's; or json")
	c.outputFlag(cmd, "json")
}

// inspected prints what an inspect found, by its --format.
func inspected[T any](c *cli, cmd *cobra.Command, vs []T, docker func(i int) (object, error)) error {
	if format, _ := cmd.Flags().GetString("format"); format != "" {
		return formatted(c, cmd, format, vs, docker)
	}
	return c.json(vs)
}

// formatted prints each by a template, or in the JSON form. A template whose fields are
// not those of the JSON form is tried on Docker's, where there are such.
func formatted[T any](c *cli, cmd *cobra.Command, format string, vs []T, docker func(i int) (object, error)) error {
	if format == "json" {
		for _, v := range vs {
			if err := c.jsonLine(v); err != nil {
				return err
			}
		}
		return nil
	}
	t, err := newTemplate(strings.NewReplacer(`\t`, "\t", `\n`, "\n").Replace(format))
	if err != nil {
		return usageError(cmd, err)
	}
	for i, v := range vs {
		text, err := fill(t, v)
		if err != nil && docker != nil {
			d, derr := docker(i)
			if derr != nil {
				return derr
			}
			if of, derr := fill(t, d); derr == nil {
				text, err = of, nil
			}
		}
		if err != nil {
			return usageError(cmd, fmt.Errorf("--format %q: %w", format, err))
		}
		fmt.Fprintln(c.out, text)
	}
	return nil
}

// noLabel is the error of a label, or an option, that a thing does not have: one may have it
// and the next not, which is no mistake in a template as the name of no field is.
var noLabel = regexp.MustCompile(`at <[^>]*\.(?:Labels|Options)\.([^.>]+)>: map has no entry for key "([^"]+)"`)

// fill executes a template. A label that is not there is "<no value>", as Docker shows it.
func fill(t *template.Template, v any) (string, error) {
	var b bytes.Buffer
	err := t.Execute(&b, v)
	if err == nil {
		return b.String(), nil
	}
	if m := noLabel.FindStringSubmatch(err.Error()); m == nil || m[1] != m[2] {
		return "", err
	}
	if t, err = t.Clone(); err != nil {
		return "", err
	}
	b.Reset()
	err = t.Option("missingkey=default").Execute(&b, v)
	return b.String(), err
}

func createdAt(ms int64) string {
	return time.UnixMilli(ms).UTC().Format("2006-01-02 15:04:05 -0700 MST")
}

// ago is how long ago a moment was, in Docker's words: "5 minutes ago".
func ago(ms int64) string { return units.HumanDuration(time.Since(time.UnixMilli(ms))) + " ago" }

func capital(s string) string {
	if s == "" {
		return ""
	}
	return strings.ToUpper(s[:1]) + s[1:]
}

// nameMatches is Docker's name filter: part of the name, or a regular expression.
func nameMatches(name, want string) bool {
	if strings.Contains(name, want) {
		return true
	}
	re, err := regexp.Compile(want)
	return err == nil && re.MatchString(name)
}

func labelText(m map[string]string) string {
	var out []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, spec.Raw(k)+"="+spec.Raw(m[k]))
	}
	return strings.Join(out, ",")
}
