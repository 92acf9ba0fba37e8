package clarifaisim

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// journalHead is the first line of a state file. It keeps a file that was named by
// mistake from being taken for a damaged journal, and overwritten.
const journalHead = `{"clarifaisim":1}`

// A journal is a file with one line for each group of changes that were made
// together. A line is written before its changes are answered; it outlives the
// process from then on, and the machine from the next compaction on.
//
// A nil journal keeps nothing.
type journal struct {
	path  string
	lock  *os.File
	file  *os.File // nil once closed
	size  int64
	lines int // since the last compaction
	// broken is set when the file no longer says what the world is.
	broken error
}

// openJournal reads the state file into w, and begins a compacted one. The last
// line may be torn, as a kill leaves it: it was never answered, and is dropped.
func openJournal(path string, w *world) (_ *journal, err error) {
	lock, err := lockState(path)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = lock.Close()
		}
	}()
	data, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read state: %w", err)
	}
	if len(data) > 0 {
		if err := replay(data, w); err != nil {
			return nil, fmt.Errorf("read state file %s: %w", path, err)
		}
	}
	j := &journal{path: path, lock: lock}
	if err := j.compact(w); err != nil {
		return nil, err
	}
	return j, nil
}

func replay(data []byte, w *world) error {
	head, rest, _ := bytes.Cut(data, []byte("\n"))
	if string(head) != journalHead {
		return errors.New("it is not the state of a simulator, or of another version")
	}
	for n := 2; len(rest) > 0; n++ {
		var line []byte
		line, rest, _ = bytes.Cut(rest, []byte("\n"))
		var changes []change
		if err := json.Unmarshal(line, &changes); err != nil {
			if len(rest) == 0 {
				return nil
			}
			return fmt.Errorf("line %d is damaged: remove the file to start with nothing", n)
		}
		for _, c := range changes {
			w.apply(c)
		}
	}
	return nil
}

// write appends changes to be made to w, which is the world before them. After an
// error they must not be made.
func (j *journal) write(changes []change, w *world) error {
	if j == nil {
		return nil
	}
	if j.file == nil {
		return errors.New("the simulator is closed")
	}
	// The more there is, the rarer: compaction stays a small share of all writing.
	if j.broken != nil || j.lines > 10_000+2*len(w.apps) {
		if err := j.compact(w); err != nil {
			return err
		}
	}
	line, err := json.Marshal(changes)
	if err != nil {
		return fmt.Errorf("encode a change: %w", err)
	}
	line = append(line, '\n')
	if _, err := j.file.WriteAt(line, j.size); err != nil {
		// What was written of it must not stand before the next line.
		j.broken = j.file.Truncate(j.size)
		return fmt.Errorf("save state: %w", err)
	}
	j.size += int64(len(line))
	j.lines++
	return nil
}

// compact replaces the file by one that says what w is and no more.
func (j *journal) compact(w *world) (err error) {
	dir := filepath.Dir(j.path)
	file, err := os.CreateTemp(dir, filepath.Base(j.path)+".*.tmp") // mode 0600
	if err != nil {
		return fmt.Errorf("save state: %w", err)
	}
	defer func() {
		if err != nil {
			_ = file.Close()
			_ = os.Remove(file.Name())
			err = fmt.Errorf("save state: %w", err)
		}
	}()
	buf := bufio.NewWriter(file)
	if _, err := buf.WriteString(journalHead + "\n"); err != nil {
		return err
	}
	enc := json.NewEncoder(buf)
	if err := w.snapshot(func(changes []change) error { return enc.Encode(changes) }); err != nil {
		return err
	}
	if err := buf.Flush(); err != nil {
		return err
	}
	if err := file.Sync(); err != nil {
		return err
	}
	info, err := file.Stat()
	if err != nil {
		return err
	}
	if err := os.Rename(file.Name(), j.path); err != nil {
		return err
	}
	syncDir(dir)
	if j.file != nil {
		_ = j.file.Close()
	}
	j.file, j.size, j.lines, j.broken = file, info.Size(), 0, nil
	return nil
}

// syncDir makes a rename outlive the machine, where the system can do so.
func syncDir(dir string) {
	if d, err := os.Open(dir); err == nil {
		_ = d.Sync()
		_ = d.Close()
	}
}

func (j *journal) close() error {
	if j == nil || j.file == nil {
		return nil
	}
	file := j.file
	j.file = nil
	err := errors.Join(file.Sync(), file.Close())
	_ = j.lock.Close() // last: from now on another simulator may write
	return err
}
