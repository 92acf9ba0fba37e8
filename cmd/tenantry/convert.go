package main

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/alecthomas/kong"
)

// A converter turns the text of settings into their types. It takes the default
// for what is empty, as deployments leave variables that they do not set, and for
// what it cannot convert: kong alone would stop at the first such setting, also of
// another command, and an operator would find the faults one start at a time.
type converter struct {
	defaults *kong.Registry
	faults   map[*kong.Value]error
}

func newConverter() *converter {
	return &converter{defaults: kong.NewRegistry().RegisterDefaults(), faults: map[*kong.Value]error{}}
}

// options make kong convert with c.
func (c *converter) options() []kong.Option {
	option := func(sample any, what string) kong.Option {
		typ := reflect.TypeOf(sample)
		m := settingMapper{converter: c, kong: c.defaults.ForType(typ), what: what}
		if typ.PkgPath() != "" { // a named type, not all of its kind
			return kong.TypeMapper(typ, m)
		}
		return kong.KindMapper(typ.Kind(), m)
	}
	return []kong.Option{
		option("", "text"),
		option(0, "a whole number"),
		option(int32(0), "a whole number"),
		option(float64(0), "a number"),
		option(time.Duration(0), "a duration such as 5s or 1m30s"),
		kong.KindMapper(reflect.Bool, boolSettingMapper{settingMapper{converter: c, kong: c.defaults.ForType(reflect.TypeFor[bool]()), what: "true or false"}}),
	}
}

// of returns the faults of those flags, in their order.
func (c *converter) of(flags []*kong.Flag) []error {
	var faults []error
	for _, f := range flags {
		if err := c.faults[f.Value]; err != nil {
			faults = append(faults, err)
		}
	}
	return faults
}

type settingMapper struct {
	*converter
	kong kong.Mapper
	what string // the text must be
}

// boolSettingMapper tells kong that such a flag needs no value.
type boolSettingMapper struct{ settingMapper }

func (boolSettingMapper) IsBool() bool { return true }

// Decode leaves the token alone that is not the flag's own value.
func (m boolSettingMapper) Decode(ctx *kong.DecodeContext, target reflect.Value) error {
	if ctx.Scan.Peek().Type != kong.FlagValueToken {
		return m.kong.Decode(ctx, target)
	}
	return m.settingMapper.Decode(ctx, target)
}

func (m settingMapper) Decode(ctx *kong.DecodeContext, target reflect.Value) error {
	text, given := ctx.Scan.Peek().Value.(string)
	whole := ctx.Value.Target.Type() == target.Type() // and not an element of a list
	if ctx.Scan.Peek().IsEOL() || !given || !whole {
		return m.kong.Decode(ctx, target)
	}
	if text == "" && (ctx.Value.HasDefault || len(ctx.Value.Tag.Envs) > 0) {
		ctx.Scan.Pop()
		return m.setDefault(ctx, target)
	}
	what := m.what
	bad := m.kong.Decode(ctx, target) != nil
	if ctx.Value.HasDefault && ctx.Value.Enum != "" { // without a default kong must say so
		what = "one of " + strings.Join(ctx.Value.EnumSlice(), ", ")
		bad = bad || !slices.Contains(ctx.Value.EnumSlice(), text)
	}
	if !bad {
		return nil
	}
	m.faults[ctx.Value] = fmt.Errorf("%s: %.80q must be %s", settingName(ctx.Value), text, what)
	return m.setDefault(ctx, target)
}

func (m settingMapper) setDefault(ctx *kong.DecodeContext, target reflect.Value) error {
	target.SetZero()
	if !ctx.Value.HasDefault {
		return nil
	}
	return m.kong.Decode(ctx.WithScanner(kong.ScanFromTokens(kong.Token{Type: kong.FlagValueToken, Value: ctx.Value.Default})), target)
}

// settingName is how messages call a setting: by its variable, if it has one.
func settingName(v *kong.Value) string {
	if len(v.Tag.Envs) > 0 {
		return v.Tag.Envs[0]
	}
	return "--" + v.Name
}
