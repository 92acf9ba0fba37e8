package cluster

import (
	"context"
	"errors"
	"net"
	"net/url"
	"sync"
)

// A Proxy forwards TCP connections to a Postgres server. Its address never changes; a
// failover changes its target. Its methods may be called concurrently.
type Proxy struct {
	listener net.Listener
	wg       sync.WaitGroup

	mu     sync.Mutex
	target *Server                                // guarded by mu
	refuse bool                                   // guarded by mu
	flow   chan struct{}                          // closed while data flows; guarded by mu
	links  map[context.Context]context.CancelFunc // each ends when its connection is cut; guarded by mu
}

func newProxy(target *Server) (*Proxy, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &Proxy{listener: l, target: target, flow: make(chan struct{}), links: map[context.Context]context.CancelFunc{}}
	close(p.flow)
	p.wg.Go(p.accept)
	return p, nil
}

// URL is the connection string of a database of the target, through the proxy.
func (p *Proxy) URL(database string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	u, err := url.Parse(p.target.URL(database))
	if err != nil {
		panic(err) // localpg made it
	}
	u.Host = p.listener.Addr().String()
	return u.String()
}

// Target is the server that new connections reach.
func (p *Proxy) Target() *Server {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.target
}

// SetTarget sends new connections to another server. Open connections keep their
// server, as after a DNS change.
func (p *Proxy) SetTarget(s *Server) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.target = s
}

// Switch sends new connections to another server and cuts the open ones: a failover.
func (p *Proxy) Switch(s *Server) {
	p.SetTarget(s)
	p.Cut()
}

// Cut cuts all open connections. Clients can connect again at once.
func (p *Proxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, cut := range p.links {
		cut()
	}
}

// Refuse cuts all open connections and resets new ones until Forward.
func (p *Proxy) Refuse() {
	p.mu.Lock()
	p.refuse = true
	p.mu.Unlock()
	p.Cut()
}

// BlackHole holds back all data in both directions until Forward. Open connections stay
// open, and new ones are accepted.
func (p *Proxy) BlackHole() {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.flow:
		p.flow = make(chan struct{})
	default: // already
	}
}

// Forward ends Refuse and BlackHole. Data that was held back is delivered.
func (p *Proxy) Forward() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refuse = false
	select {
	case <-p.flow:
	default:
		close(p.flow)
	}
}

// wait waits while data is held back, and reports false if the connection is cut.
func (p *Proxy) wait(ctx context.Context) bool {
	p.mu.Lock()
	flow := p.flow
	p.mu.Unlock()
	select {
	case <-ctx.Done():
	case <-flow:
	}
	return ctx.Err() == nil
}

func (p *Proxy) accept() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return // closed
		}
		ctx, cut := context.WithCancel(context.Background())
		p.mu.Lock()
		if p.refuse {
			cut()
		}
		p.links[ctx] = cut
		p.mu.Unlock()
		p.wg.Go(func() {
			p.forward(ctx, client.(*net.TCPConn))
			cut()
			p.mu.Lock()
			delete(p.links, ctx)
			p.mu.Unlock()
		})
	}
}

// forward serves one connection until either side closes it or it is cut.
func (p *Proxy) forward(ctx context.Context, client *net.TCPConn) {
	if !p.wait(ctx) {
		reset(client)
		return
	}
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", p.Target().Addr())
	if err != nil {
		reset(client)
		return
	}
	server := conn.(*net.TCPConn)
	defer context.AfterFunc(ctx, func() { reset(client); reset(server) })()
	pump := func(to, from net.Conn) {
		buf := make([]byte, 32<<10)
		for {
			n, err := from.Read(buf)
			if !p.wait(ctx) {
				return
			}
			if n > 0 {
				_, writeErr := to.Write(buf[:n])
				err = errors.Join(err, writeErr)
			}
			if err != nil {
				_, _ = from.Close(), to.Close() // this ends the other pump
				return
			}
		}
	}
	var pumps sync.WaitGroup
	pumps.Go(func() { pump(server, client) })
	pumps.Go(func() { pump(client, server) })
	pumps.Wait()
}

// reset closes a connection with RST.
func reset(conn *net.TCPConn) {
	_ = conn.SetLinger(0)
	_ = conn.Close()
}

func (p *Proxy) close() {
	_ = p.listener.Close()
	p.Refuse() // also cuts a connection that was accepted just before
	p.wg.Wait()
}
