package clarifaisim

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

func (s *Sim) listApps(c *call) answer {
	p, err := c.page()
	if err != nil {
		return refuse(codeInvalidRequest, "%v", err)
	}
	keep, err := c.appFilter()
	if err != nil {
		return refuse(codeInvalidRequest, "%v", err)
	}
	order, err := c.appOrder()
	if err != nil {
		return refuse(codeInvalidRequest, "%v", err)
	}
	var apps []*app
	for ref, a := range s.world.apps {
		if ref.UserID == c.user && a.visible(c.now) && keep(a) {
			apps = append(apps, a)
		}
	}
	slices.SortFunc(apps, order)
	found := make([]appFields, 0, p.size)
	for _, a := range cutPage(apps, p) {
		found = append(found, a.answered(c.wantsCounts()))
	}
	return ok(member{"apps", found})
}

// appOrder reads the sort options. Apps that are equal in the one asked for come
// in the order of their creation, so that pages do not overlap.
func (c *call) appOrder() (func(a, b *app) int, error) {
	orders := map[string]func(a, b *app) int{
		"sort_by_name":        func(a, b *app) int { return cmp.Compare(a.App.Name, b.App.Name) },
		"sort_by_modified_at": func(a, b *app) int { return a.App.ModifiedAt.Compare(b.App.ModifiedAt) },
		"sort_by_created_at":  func(a, b *app) int { return a.App.CreatedAt.Compare(b.App.CreatedAt) },
		"sort_by_id":          func(a, b *app) int { return cmp.Compare(a.App.ID, b.App.ID) },
		// Nobody stars apps here, and all that is found is found alike.
		"sort_by_star_count": func(a, b *app) int { return 0 },
		"sort_by_relevance":  func(a, b *app) int { return 0 },
	}
	chosen := ""
	for name := range orders {
		set, err := c.flag(name)
		if err != nil {
			return nil, err
		}
		if set && chosen != "" {
			return nil, errors.New("only one sort_by_ option may be given")
		}
		if set {
			chosen = name
		}
	}
	if chosen == "sort_by_relevance" && c.query.Get("search") == "" {
		return nil, errors.New("sort_by_relevance goes with search only")
	}
	ascending, err := c.flag("sort_ascending")
	if err != nil {
		return nil, err
	}
	first := orders[cmp.Or(chosen, "sort_by_modified_at")]
	return func(a, b *app) int {
		n := cmp.Or(first(a, b), byCreation(a, b))
		if ascending {
			return n
		}
		return -n
	}, nil
}

// appFilter reads the filters of ListApps.
func (c *call) appFilter() (func(*app) bool, error) {
	var flags [3]bool
	for i, name := range []string{"featured_only", "starred_only", "template_only"} {
		var err error
		if flags[i], err = c.flag(name); err != nil {
			return nil, err
		}
	}
	var seenBy gettable
	if text := c.query.Get("visibility.gettable"); text != "" {
		if err := seenBy.UnmarshalJSON([]byte(text)); err != nil {
			if err := seenBy.UnmarshalJSON([]byte(strconv.Quote(text))); err != nil {
				return nil, fmt.Errorf("visibility.%w", err)
			}
		}
	}
	query, name, id := c.query.Get("query"), c.query.Get("name"), c.query.Get("id")
	search := cmp.Or(c.query.Get("search"), query)
	return func(a *app) bool {
		switch {
		case flags[0] || flags[1]: // nothing is featured or starred here
			return false
		case flags[2] && (a.App.IsTemplate == nil || !*a.App.IsTemplate):
			return false
		case seenBy != 0 && a.App.Visibility.Gettable != seenBy:
			return false
		case name != "" && a.App.Name != name, id != "" && a.App.ID != id:
			return false
		}
		return search == "" || a.App.matches(search)
	}, nil
}

// matches reports whether every word of a search begins a word of the app.
func (f appFields) matches(search string) bool {
	words := strings.FieldsFunc(strings.ToLower(strings.Join([]string{f.ID, f.Name, f.Description, f.Notes}, " ")), isSeparator)
	words = append(words, strings.ToLower(f.ID))
	for part := range strings.FieldsSeq(strings.ToLower(search)) {
		if !slices.ContainsFunc(words, func(w string) bool { return strings.HasPrefix(w, part) }) {
			return false
		}
	}
	return true
}

func isSeparator(r rune) bool { return strings.ContainsRune(" \t\n-_.,;:/", r) }
