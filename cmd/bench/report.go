package main

import (
	"encoding/csv"
	"errors"
	"fmt"
	"html"
	"io"
	"math"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// samples are all that was measured.
type samples []sample

// of are the samples of one row at one number of connections, by round.
func (all samples) of(name string, connections int) samples {
	var of samples
	for _, s := range all {
		if s.row.name == name && s.connections == connections {
			of = append(of, s)
		}
	}
	return of
}

// ratio is how s compares with a baseline of the same round; 0 if there is none.
func (all samples) ratio(s sample, baseline string) float64 {
	for _, b := range all.of(baseline, s.connections) {
		if b.round == s.round {
			return s.perSecond / b.perSecond
		}
	}
	return 0
}

// median is the middle of what value says of the samples: of two in the middle the
// lower.
func (all samples) median(value func(sample) float64) float64 {
	if len(all) == 0 {
		return math.NaN()
	}
	values := make([]float64, len(all))
	for i, s := range all {
		values[i] = value(s)
	}
	slices.Sort(values)
	return values[(len(values)-1)/2]
}

func perSecond(s sample) float64 { return s.perSecond }

func millis(of func(sample) time.Duration) func(sample) float64 {
	return func(s sample) float64 { return float64(of(s)) / float64(time.Millisecond) }
}

var (
	p50 = millis(func(s sample) time.Duration { return s.p50 })
	p99 = millis(func(s sample) time.Duration { return s.p99 })
)

// perRequest is a time of the processors, by requests, in microseconds.
func perRequest(of func(sample) time.Duration) func(sample) float64 {
	return func(s sample) float64 {
		return float64(of(s)) / float64(time.Microsecond) / float64(max(1, s.requests))
	}
}

var (
	toolCPU     = perRequest(func(s sample) time.Duration { return s.toolCPU })
	tenantryCPU = perRequest(func(s sample) time.Duration { return s.tenantryCPU })
	postgresCPU = perRequest(func(s sample) time.Duration { return s.postgresCPU })
)

// short names a baseline in a cell.
func short(baseline string) string {
	return strings.TrimSuffix(strings.TrimPrefix(baseline, "pgbench "), " handler")
}

// table prints what was measured at one number of connections: medians of the rounds.
// The ratios are taken within each round.
func (all samples) table(out io.Writer, rows []row, connections int) {
	_, _ = fmt.Fprintln(out)
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	_, _ = fmt.Fprintf(w, "%d connections\t/s\tp50 ms\tp99 ms\tto pgbench\tto bare\ttarget\tCPU µs: Tenantry\tPostgres\ttool\t\n", connections)
	for _, r := range rows {
		of := all.of(r.name, connections)
		number := func(v float64, digits int) string {
			if v == 0 || math.IsNaN(v) {
				return "–"
			}
			return fmt.Sprintf("%.*f", digits, v)
		}
		against, toBare, target := "–", "–", "–"
		var own, postgres float64
		if r.against != "" {
			against = fmt.Sprintf("%.2f (%s)", of.median(func(s sample) float64 { return all.ratio(s, r.against) }), short(r.against))
			toBare = fmt.Sprintf("%.2f", of.median(func(s sample) float64 { return all.ratio(s, bare) }))
		}
		if r.replica != nil || r.name == bare {
			own = of.median(tenantryCPU)
		}
		if r.name != bare {
			postgres = of.median(postgresCPU)
		}
		if r.target > 0 && connections == targetAt {
			target = fmt.Sprintf("≥ %.2f (%s)", r.target, short(r.targetOf))
		}
		_, _ = fmt.Fprintf(w, "%s\t%.0f\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%.0f\t\n", r.name, of.median(perSecond), number(of.median(p50), 2), number(of.median(p99), 2),
			against, toBare, target, number(own, 0), number(postgres, 0), of.median(toolCPU))
	}
	_ = w.Flush()
}

// writeFiles writes the CSV, a line for each sample, and the plot.
func (all samples) writeFiles(name, tool string, rows []row) error {
	f, err := os.Create(name + ".csv")
	if err != nil {
		return err
	}
	w := csv.NewWriter(f)
	_ = w.Write([]string{"connections", "round", "row", "tool", "requests", "per_second", "p50_ms", "p99_ms", "baseline", "to_baseline", "to_bare",
		"tenantry_cpu_us", "postgres_cpu_us", "tool_cpu_us"})
	for _, s := range all {
		by, toBaseline, toBare := tool, "", ""
		if strings.HasPrefix(s.row.name, "pgbench") {
			by = "pgbench"
		}
		if s.row.against != "" {
			toBaseline, toBare = fmt.Sprintf("%.3f", all.ratio(s, s.row.against)), fmt.Sprintf("%.3f", all.ratio(s, bare))
		}
		_ = w.Write([]string{fmt.Sprint(s.connections), fmt.Sprint(s.round), s.row.name, by, fmt.Sprint(s.requests), fmt.Sprintf("%.1f", s.perSecond),
			fmt.Sprintf("%.3f", p50(s)), fmt.Sprintf("%.3f", p99(s)), s.row.against, toBaseline, toBare,
			fmt.Sprintf("%.1f", tenantryCPU(s)), fmt.Sprintf("%.1f", postgresCPU(s)), fmt.Sprintf("%.1f", toolCPU(s))})
	}
	w.Flush() // Error tells of all that was written
	if err := errors.Join(w.Error(), f.Close()); err != nil {
		return err
	}
	return os.WriteFile(name+".svg", []byte(all.plot(rows)), 0o644)
}

// Of the plot, in pixels.
const (
	plotWidth, plotHeight = 460, 320
	plotLeft, plotTop     = 60, 40
)

var plotColors = []string{"#222222", "#999999", "#1f77b4", "#17becf", "#9467bd", "#8c564b", "#2ca02c", "#d62728", "#ff7f0e", "#e377c2", "#bcbd22",
	"#aec7e8", "#98df8a"}

// plot draws requests a second, and the ratios to pgbench, by connections.
func (all samples) plot(rows []row) string {
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="12">`+"\n",
		2*(plotWidth+plotLeft)+180, plotHeight+plotTop+50)
	b.WriteString(`<rect width="100%" height="100%" fill="white"/>` + "\n")
	rate := func(r row, n int) float64 { return all.of(r.name, n).median(perSecond) }
	most, least, highest := 0.0, math.Inf(1), 1.0
	ratio := func(r row, n int) float64 {
		if r.against == "" {
			return math.NaN()
		}
		return all.of(r.name, n).median(func(s sample) float64 { return all.ratio(s, r.against) })
	}
	for _, r := range rows {
		for _, n := range connections {
			if v := rate(r, n); v > 0 { // not NaN: the row has not failed
				most, least = max(most, v), min(least, v)
			}
			if v := ratio(r, n); v > highest {
				highest = v
			}
		}
	}
	low, high := math.Floor(math.Log10(least)), math.Ceil(math.Log10(most))
	var decades, tenths []float64
	for d := low; d <= high; d++ {
		decades = append(decades, math.Pow(10, d))
	}
	for v := 0.0; v <= highest; v += 0.2 {
		tenths = append(tenths, v)
	}
	panel(&b, 0, "a second, by connections", rows, decades, "%.0f", rate, func(v float64) float64 { return (math.Log10(v) - low) / (high - low) })
	panel(&b, plotWidth+plotLeft, "ratio to pgbench, by connections", rows, tenths, "%.1f", ratio, func(v float64) float64 { return v / highest })
	for i, r := range rows {
		y := plotTop + 10 + 20*i
		fmt.Fprintf(&b, `<rect x="%d" y="%d" width="12" height="12" fill="%s"/><text x="%d" y="%d">%s</text>`+"\n",
			2*(plotWidth+plotLeft)+20, y, plotColors[i%len(plotColors)], 2*(plotWidth+plotLeft)+38, y+11, html.EscapeString(r.name))
	}
	b.WriteString("</svg>\n")
	return b.String()
}

// panel draws one line for each row; place says where a value is, from 0 to 1.
func panel(b *strings.Builder, left int, title string, rows []row, grid []float64, format string, value func(row, int) float64, place func(float64) float64) {
	x := func(i int) float64 {
		return float64(left+plotLeft) + 20 + float64(i)*float64(plotWidth-60)/float64(len(connections)-1)
	}
	y := func(v float64) float64 { return plotTop + plotHeight*(1-place(v)) }
	fmt.Fprintf(b, `<text x="%d" y="%d" font-size="14">%s</text>`+"\n", left+plotLeft, plotTop-16, title)
	for _, v := range grid {
		fmt.Fprintf(b, `<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="#dddddd"/><text x="%d" y="%.1f" text-anchor="end">%s</text>`+"\n",
			left+plotLeft, left+plotLeft+plotWidth-20, y(v), y(v), left+plotLeft-6, y(v)+4, fmt.Sprintf(format, v))
	}
	for i, n := range connections {
		fmt.Fprintf(b, `<text x="%.1f" y="%d" text-anchor="middle">%d</text>`+"\n", x(i), plotTop+plotHeight+20, n)
	}
	for k, r := range rows {
		var points []string
		for i, n := range connections {
			if v := value(r, n); !math.IsNaN(v) {
				points = append(points, fmt.Sprintf("%.1f,%.1f", x(i), y(v)))
			}
		}
		if len(points) > 0 {
			fmt.Fprintf(b, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2"/>`+"\n", strings.Join(points, " "), plotColors[k%len(plotColors)])
		}
	}
}
