package clarifaisim

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
)

// decode reads the body. Unknown fields are ignored, as Clarifai is assumed to do.
func (c *call) decode(into any) (refusal answer, refused bool) {
	if err := json.Unmarshal(c.body, into); err != nil {
		return refuse(codeBadFormat, "the body cannot be read: %v", err), true
	}
	return answer{}, false
}

// A page is the part of a list that is asked for.
type page struct{ number, size int }

const (
	defaultPerPage = 128
	maxPerPage     = 1000
)

func (c *call) page() (page, error) {
	number, err := c.number("page", 1)
	if err != nil {
		return page{}, err
	}
	size, err := c.number("per_page", defaultPerPage)
	if err != nil {
		return page{}, err
	}
	if size > maxPerPage {
		return page{}, fmt.Errorf("per_page has to be at most %d", maxPerPage)
	}
	return page{number, size}, nil
}

// number reads an unsigned parameter; absent and 0 mean the default.
func (c *call) number(name string, otherwise int) (int, error) {
	text := c.query.Get(name)
	if text == "" {
		return otherwise, nil
	}
	n, err := strconv.ParseUint(text, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("%s has to be a number", name)
	}
	if n == 0 {
		return otherwise, nil
	}
	return int(n), nil
}

func (c *call) flag(name string) (bool, error) {
	text := c.query.Get(name)
	if text == "" {
		return false, nil
	}
	b, err := strconv.ParseBool(text)
	if err != nil {
		return false, fmt.Errorf("%s has to be true or false", name)
	}
	return b, nil
}

// cutPage returns a page of a list, counted from 1. A page after the last is empty
// and not nil.
func cutPage[T any](list []T, p page) []T {
	for chunk := range slices.Chunk(list, p.size) {
		if p.number--; p.number == 0 {
			return chunk
		}
	}
	return []T{}
}
